"""Our errors, each with the gRPC status and the HTTP status that it becomes at the edge.

A servicer raises them, `wire.interceptors` turns them into statuses, and `from_rpc_error` turns
the status back into the same class on the caller's side: foreign errors are translated once.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import ClassVar, cast

import grpc

_DETAILS_KEY = "fednano-error-bin"


@dataclass(frozen=True)
class Problem:
    """One field of a request that was not as expected."""

    field: str
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{self.field}: expected {self.expected}, got {self.got}"

    @classmethod
    def read(cls, text: str) -> Problem | None:
        """The problem that `text` states, as our validators' errors do; None where it is none."""
        found = re.fullmatch(r"(\S+): expected (.+), got (.+)", text)
        return cls(*found.groups()) if found else None


class FedNanoError(Exception):
    """The base of all errors that may reach a caller."""

    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    http_status: ClassVar[int] = 500

    def __init__(self, detail: str, *problems: Problem) -> None:
        super().__init__(detail)
        self.detail = detail
        self.problems = problems


class InvalidRequest(FedNanoError):
    """What was sent can't be used; sending it again changes nothing."""

    status = grpc.StatusCode.INVALID_ARGUMENT
    http_status = 422

    @classmethod
    def of(cls, field: str, expected: object, got: object) -> InvalidRequest:
        """The usual case: one field, what was expected and what came."""
        problem = Problem(field, str(expected), str(got))
        return cls(str(problem), problem)


class BadTensor(InvalidRequest):
    """A tensor whose dtype, shape, size or values are not acceptable."""


class Unauthenticated(FedNanoError):
    status = grpc.StatusCode.UNAUTHENTICATED
    http_status = 401

    def __init__(self, detail: str = "a valid bearer token is required", *problems: Problem):
        super().__init__(detail, *problems)


class PermissionDenied(FedNanoError):
    status = grpc.StatusCode.PERMISSION_DENIED
    http_status = 403

    def __init__(self, detail: str = "this token's role may not do that", *problems: Problem):
        super().__init__(detail, *problems)


class NotFound(FedNanoError):
    status = grpc.StatusCode.NOT_FOUND
    http_status = 404


class UnknownActivation(NotFound):
    """The activation is gone; send the embeddings again."""


class UnknownBase(NotFound):
    """Bases that are not held for this caller, here and now: upload them, and ask again.

    The problem of the field `embeddings.bases` names them by their places, as in "0-3,7".
    """


class WrongModel(FedNanoError):
    """The caller's half and this service's half were not cut from the same checkpoint."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 409


class UnsupportedProtocol(FedNanoError):
    status = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 409


class Conflict(FedNanoError):
    """The thing is not in a state that allows this."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 409


class SessionEnded(FedNanoError):
    """Another process has joined under the same client id, or the session expired: join again."""

    status = grpc.StatusCode.ABORTED
    http_status = 409


class Busy(FedNanoError):
    """The queue is full; try again later."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 503


class Unavailable(FedNanoError):
    """The service, or something that it needs, can't be reached now; try again."""

    status = grpc.StatusCode.UNAVAILABLE
    http_status = 503


class DeadlineExceeded(FedNanoError):
    status = grpc.StatusCode.DEADLINE_EXCEEDED
    http_status = 504


class Unsupported(FedNanoError):
    """Part of the contract that this service doesn't offer."""

    status = grpc.StatusCode.UNIMPLEMENTED
    http_status = 501


RETRYABLE = (Busy, Unavailable, DeadlineExceeded)
"""Errors after which the same request may be sent again."""


def _descendants(cls: type[FedNanoError]) -> list[type[FedNanoError]]:
    return [cls, *(d for child in cls.__subclasses__() for d in _descendants(child))]


def to_metadata(error: FedNanoError) -> tuple[tuple[str, bytes], ...]:
    """Trailing metadata that lets the caller rebuild `error`."""
    body = {"type": type(error).__name__, "problems": [asdict(p) for p in error.problems]}
    return ((_DETAILS_KEY, json.dumps(body).encode()),)


def from_rpc_error(error: grpc.RpcError) -> FedNanoError:
    """The error that the service raised, or the nearest one for a status made by gRPC itself."""
    status, detail = error.code(), error.details() or "no detail given"
    known = _descendants(FedNanoError)
    name, problems = _sent(error)
    for cls in known:
        if cls.__name__ == name:
            return cls(detail, *problems)
    if status in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN):
        return Unavailable(detail)
    for cls in known[1:]:
        if cls.status is status:
            return cls(detail)
    return FedNanoError(f"{status.name}: {detail}")


def _sent(error: grpc.RpcError) -> tuple[str, tuple[Problem, ...]]:
    """The class name and problems in the trailing metadata; empty where a status came without."""
    pairs = cast("tuple[tuple[str, str | bytes], ...]", error.trailing_metadata() or ())
    metadata = dict(pairs)
    try:
        body = json.loads(metadata[_DETAILS_KEY])
        return str(body["type"]), tuple(Problem(**p) for p in body["problems"])
    except (KeyError, TypeError, ValueError):
        return "", ()
