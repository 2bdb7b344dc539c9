"""A cable with a rate on one machine: a network namespace at its far end, a veth pair, and tc's token
bucket each way. Linux's, and root's."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from shutil import which

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET of sched.h
_LATENCY = "400ms"  # of what waits at the rate; more is dropped, and TCP slows down
BURST = 16_000
"""Bytes at least that may go at once after a pause; more where the rate is high, or the kernel's clock
would bound it."""
_BURST_SECONDS = 0.002


@dataclass(frozen=True)
class Cable:
    """`namespace` is the far end's, where `host` is its address."""

    namespace: str
    host: str


class NoCable(Exception):
    """This machine, or this user, can't; the sentence says why."""


@contextmanager
def cable(number: int, megabits: int) -> Iterator[Cable]:
    """Of those that this process lays, the one with that number; gone when it is left.

    Raises NoCable.
    """
    if os.name != "posix" or os.geteuid() != 0 or not (which("ip") and which("tc")):
        raise NoCable("network namespaces take root, ip and tc")
    name, near = f"fednano-{os.getpid()}-{number}", f"fn{os.getpid()}.{number}"[:15]
    net = f"198.18.{number}"  # of the range for benchmarks, RFC 2544
    _run(f"ip netns add {name}")
    try:
        _run(f"ip link add {near} type veth peer name far netns {name}")
        _run(f"ip addr add {net}.1/30 dev {near}")
        _run(f"ip -n {name} addr add {net}.2/30 dev far")
        burst = max(BURST, int(megabits * 1e6 / 8 * _BURST_SECONDS))
        for device, where in ((near, ""), ("far", f"-n {name} ")):
            bucket = f"tbf rate {megabits}mbit burst {burst} latency {_LATENCY}"
            _run(f"tc {where}qdisc add dev {device} root {bucket}")
            _run(f"ip {where}link set {device} up")
        yield Cable(name, f"{net}.2")
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)  # and both ends with it


def listening(at: Cable) -> socket.socket:
    """A socket at the far end, of a process that is at the near one: sockets stay in the namespace in
    which they were made."""
    with ThreadPoolExecutor(1) as thread:  # only this thread goes there, and ends there
        return thread.submit(_listening, at).result()


def _listening(at: Cable) -> socket.socket:
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{at.namespace}") as namespace:
        if libc.setns(namespace.fileno(), _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"setns {at.namespace}")
    return socket.create_server((at.host, 0))


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode:
        raise NoCable(f"{command}: {done.stderr.strip()}")
