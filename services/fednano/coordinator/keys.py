"""Every Redis key, spelled in this one file.

`ROOT:run:<run>:...` belongs to one run. Client ids are checked before they get here (`CLIENT_ID`).
"""

from __future__ import annotations

import re

ROOT = "fednano"
CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # the whole of it

SCHEMA = f"{ROOT}:schema"  # string: version of this layout
LEADER = f"{ROOT}:leader"  # string with a time to live: "<owner>:<fence>"
FENCE = f"{ROOT}:fence"  # counter: how often the lease changed hands
RUN_COUNT = f"{ROOT}:run-count"  # counter: order of creation
RUNS = f"{ROOT}:runs"  # sorted set: run -> order of creation
ACTIVE = f"{ROOT}:active"  # set: runs that have not ended
TOKENS = f"{ROOT}:tokens"  # hash: token id -> record as JSON, with the secret's hash
TOKEN_HASHES = f"{ROOT}:token-hashes"  # hash: SHA-256 of the secret -> token id
LEDGER_TOTALS = "totals"
LEDGER_REPORTS = "reports"


def run(name: str) -> str:
    """Hash: the run's fields; `version` counts its changes."""
    return f"{ROOT}:run:{name}"


def events(name: str) -> str:
    """Stream: kind, data."""
    return f"{run(name)}:events"


def bell(name: str) -> str:
    """Channel: something about the run has changed. The payload is the kind of change: its event's,
    or one of those below."""
    return f"{ROOT}:bell:{name}"


BELLS = bell("*")
ACTIVE_BELL = bell("")  # a run was created or ended
SEATS = "seats"  # who is a member; the run stays in its state and round


def session(client_id: str) -> str:
    """A client's session has ended: a kind of its own, so that it alone is woken."""
    return f"session:{client_id}"


def clients(name: str) -> str:
    """Set: ids of trainers and evaluators."""
    return f"{run(name)}:clients"


def client_prefix(name: str) -> str:
    """For scripts, that add the id."""
    return f"{run(name)}:client:"


def client(name: str, client_id: str) -> str:
    """Hash: role, session, what it is doing, when it was last heard."""
    return f"{client_prefix(name)}{client_id}"


def rounds(name: str) -> str:
    """Sorted set: round numbers that were opened."""
    return f"{run(name)}:rounds"


def round_(name: str, number: int) -> str:
    """Hash: the round's fields, of its newest attempt."""
    return f"{round_prefix(name)}{number}"


def round_prefix(name: str) -> str:
    """For scripts, that add the number."""
    return f"{run(name)}:round:"


def attempt(name: str, number: int, attempt_number: int) -> str:
    return f"{round_(name, number)}:{attempt_number}"


def moments(name: str) -> str:
    """Hash: what a strategy carries on; round, layout, raw fp32 tensors as `data`, and as `handed` the
    digest of those that clients get."""
    return f"{run(name)}:moments"


def shadow_moments(name: str, index: int) -> str:
    """The same of one of the run's shadows."""
    return f"{moments(name)}:{index}"


def shadows(name: str) -> str:
    """Hash: digest -> raw fp32 tensors, and `shadow_meta` -> layout, scale and round as JSON, of what
    the shadows made in the round that is being evaluated."""
    return f"{run(name)}:shadows"


def shadow_meta(digest: str) -> str:
    return f"{digest}:meta"


def passing(name: str, shadow_count: int) -> tuple[str, ...]:
    """What a run with so many shadows needs no more once it is over."""
    own = (shadow_moments(name, index) for index in range(shadow_count))
    return moments(name), *own, shadows(name)


def cohort(name: str, number: int, attempt_number: int) -> str:
    """Set: clients that are to train."""
    return f"{attempt(name, number, attempt_number)}:cohort"


def submitted(name: str, number: int, attempt_number: int) -> str:
    """Hash: client -> metadata of its accepted update, JSON. In an asynchronous run `part` -> that."""
    return f"{attempt(name, number, attempt_number)}:submitted"


def answered(name: str, number: int, attempt_number: int) -> str:
    """Hash: client -> "<round>:<attempt>" that its update is part of, of those who were handed this
    attempt's adapter in an asynchronous run."""
    return f"{attempt(name, number, attempt_number)}:answered"


def part(client_id: str, number: int) -> str:
    """Of an asynchronous round: a client's update that started as the one of round `number`. It
    stands for the client's id among the submitted and the updates."""
    return f"{client_id}@{number}"


def refused(name: str, number: int, attempt_number: int) -> str:
    """Hash: client -> the last reason."""
    return f"{attempt(name, number, attempt_number)}:refused"


def late(name: str, number: int, attempt_number: int) -> str:
    """Set: clients whose update came too late."""
    return f"{attempt(name, number, attempt_number)}:late"


def update(name: str, number: int, attempt_number: int, client_id: str) -> str:
    """String: raw fp32 tensors, sorted by name; its metadata has the layout."""
    return f"{attempt(name, number, attempt_number)}:update:{client_id}"


def evaluations(name: str, number: int) -> str:
    """Hash: client -> role and metrics by adapter, JSON."""
    return f"{round_(name, number)}:evaluations"


def round_bytes(name: str, number: int) -> str:
    """Hash: kind -> bytes, both directions."""
    return f"{round_(name, number)}:bytes"


def ledger_index(name: str) -> str:
    """Sorted set in lexical order: "<round>/<client>"."""
    return f"{run(name)}:ledger"


def ledger_member(number: int, client_id: str) -> str:
    return f"{number:08d}/{client_id}"


def ledger_row(name: str, member: str) -> str:
    """Hash: sent:<kind>, received:<kind>, client_seconds, server_seconds."""
    return f"{run(name)}:ledger:{member}"


def ledger_totals(name: str) -> str:
    """Hash: as a row, over the whole run."""
    return f"{run(name)}:ledger:{LEDGER_TOTALS}"


def ledger_reports(name: str) -> str:
    """Hash: "<rpc>/<client>" -> the request whose costs were counted last."""
    return f"{run(name)}:ledger:{LEDGER_REPORTS}"


def ledger(name: str, number: int, client_id: str) -> tuple[str, ...]:
    """What a script needs to count a client's costs in a round."""
    return (
        ledger_index(name),
        ledger_row(name, ledger_member(number, client_id)),
        ledger_totals(name),
        round_bytes(name, number),
        ledger_reports(name),
    )


def adapters(name: str) -> str:
    """Hash: digest -> layout, scale, round and when it was dropped, JSON."""
    return f"{run(name)}:adapters"


def adapter_rounds(name: str) -> str:
    """Hash: round -> digest."""
    return f"{run(name)}:adapter-rounds"


def kept_rounds(name: str) -> str:
    """Sorted set: rounds whose adapter is kept."""
    return f"{run(name)}:kept-rounds"


def adapter(name: str, digest: str) -> str:
    """String: raw fp32 tensors, sorted by name."""
    return f"{run(name)}:adapter:{digest}"
