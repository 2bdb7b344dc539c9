"""Errors over HTTP: whatever goes wrong leaves as RFC 9457 problem+json, with nothing internal in it.

One handler serves our errors, FastAPI's validation, Starlette's own (404, 405) and the unexpected.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from fednano.wire.errors import FedNanoError, InvalidRequest, Problem, Unauthenticated

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
_LONGEST_VALUE = 200  # characters of a caller's value that are repeated back


class FieldProblem(BaseModel):
    """One field that was not as expected."""

    field: str
    expected: str
    got: str


class ProblemReply(BaseModel):
    """What every refused or failed request answers (RFC 9457)."""

    type: str = Field(description="urn:fednano:problem:NAME; stable, for programs")
    title: str = Field(description="the kind of problem, in words")
    status: int
    detail: str = Field(description="a sentence about this very request")
    errors: list[FieldProblem] = Field(description="the fields at fault, where there are any")
    request_id: str = Field(description="as in X-Request-ID and in the service's log")


def problem_response(error: Exception, request_id: str) -> Response:
    """The reply for any error; what isn't ours or HTTP's own is told apart only in the log."""
    if isinstance(error, RequestValidationError):
        error = _invalid(error)
    if isinstance(error, HTTPException):
        phrase = HTTPStatus(error.status_code).phrase
        detail = "no such path" if error.detail == "Not Found" else error.detail
        return _reply(error.status_code, phrase, detail, (), request_id, error.headers)
    if isinstance(error, FedNanoError) and error.http_status != HTTPStatus.INTERNAL_SERVER_ERROR:
        title = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).capitalize()
        headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, Unauthenticated) else None
        return _reply(error.http_status, title, error.detail, error.problems, request_id, headers)
    log.error("request failed", exc_info=error)
    return _reply(500, "Internal error", "internal error; see the service's log", (), request_id)


async def handle(request: Request, error: Exception) -> Response:
    """The one exception handler of the application."""
    return problem_response(error, request.state.request_id)


def _reply(
    status: int,
    title: str,
    detail: str,
    problems: Sequence[Problem],
    request_id: str,
    headers: Mapping[str, str] | None = None,
) -> Response:
    body = ProblemReply(
        type=f"urn:fednano:problem:{title.lower().replace(' ', '-')}",
        title=title,
        status=status,
        detail=detail,
        errors=[FieldProblem(field=p.field, expected=p.expected, got=p.got) for p in problems],
        request_id=request_id,
    )
    return Response(body.model_dump_json(), status, headers, MEDIA_TYPE)


def _invalid(error: RequestValidationError) -> InvalidRequest:
    problems = [_field(item) for item in error.errors()]
    return InvalidRequest("; ".join(map(str, problems)), *problems)


def _field(item: Mapping[str, Any]) -> Problem:
    """One of pydantic's errors; the field is named as the caller wrote it (`training.epochs`)."""
    if item["type"] == "json_invalid":
        return Problem(
            "body", "valid JSON", str(item.get("ctx", {}).get("error", "something else"))
        )
    if item["type"] == "value_error":  # a validator of ours: its text names the field itself
        stated = Problem.read(str(item["ctx"]["error"]))
        if stated is not None:
            return stated
    where, *path = item["loc"]
    name = ".".join(map(str, path)) or str(where)
    if item["type"] == "missing":
        return Problem(name, "a value", "nothing")
    got = repr(item.get("input"))[:_LONGEST_VALUE]
    if item["type"] == "extra_forbidden":
        return Problem(name, "no such field", got)
    text = item["msg"].removeprefix("Input should be ")
    return Problem(name, text[:1].lower() + text[1:], got)
