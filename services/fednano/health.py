"""Is a service healthy? For the health checks of containers, where a second of imports every few
seconds would be too much:  python -m fednano.health [--ca FILE] ADDRESS

Exit status 0 where it is, else 1 and a sentence.
"""

from __future__ import annotations

import argparse
import ssl
import sys
import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

_SCHEMES = ("grpc", "grpcs", "http", "https")


def ask_grpc(target: str, tls: bool, ca: Path | None, seconds: float) -> str:
    """Nothing where the standard health service says SERVING, else what is wrong."""
    import grpc
    from grpc_health.v1 import health_pb2
    from grpc_health.v1.health_pb2_grpc import HealthStub

    if tls:
        roots = grpc.ssl_channel_credentials(ca.read_bytes() if ca else None)
        channel = grpc.secure_channel(target, roots)
    else:
        channel = grpc.insecure_channel(target)
    with channel:
        try:
            request = health_pb2.HealthCheckRequest()
            stub: Any = HealthStub(channel)  # its types know no methods
            reply = stub.Check(request, timeout=seconds)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    return "" if reply.status == health_pb2.HealthCheckResponse.SERVING else status


def ask_http(url: str, ca: Path | None, seconds: float) -> str:
    """Nothing where a GET succeeds, else what is wrong."""
    context = ssl.create_default_context(cafile=str(ca)) if url.startswith("https:") else None
    try:
        with urllib.request.urlopen(url, timeout=seconds, context=context):
            return ""
    except HTTPError as error:
        return f"HTTP {error.code}"
    except (URLError, OSError) as error:
        return str(getattr(error, "reason", error))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fednano.health", description=__doc__)
    parser.add_argument("address", help="grpc://HOST:PORT, grpcs://HOST:PORT or an http(s) URL")
    parser.add_argument("--ca", type=Path, help="certificate of the authority that signed theirs")
    parser.add_argument("--seconds", type=float, default=8.0, help="to wait for an answer")
    given = parser.parse_args(arguments)
    parts = urlsplit(given.address)
    if parts.scheme not in _SCHEMES or not parts.netloc:
        wanted = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
        parser.error(f"address: expected one that begins with {wanted}, got {given.address!r}")
    if parts.scheme.startswith("grpc"):
        wrong = ask_grpc(parts.netloc, parts.scheme == "grpcs", given.ca, given.seconds)
    else:
        wrong = ask_http(given.address, given.ca, given.seconds)
    if wrong:
        print(f"{given.address} is not healthy: {wrong}", file=sys.stderr)  # noqa: T201
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
