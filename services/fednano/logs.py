"""Logs of every service: one line per event, for people or as JSON, with the same fields.

Whose work a line is about is bound once, where a call, a request or a task begins, and is then in
every line that is written meanwhile.
"""

from __future__ import annotations

import logging
import sys
import unicodedata

import structlog
from structlog.contextvars import bind_contextvars, get_contextvars, merge_contextvars
from structlog.typing import EventDict, Processor, WrappedLogger

from fednano import tracing

_LONGEST = 128  # characters of an id that a caller sent


def configure(service: str, json: bool = False, level: str = "info") -> None:
    """Sends the standard library's loggers to standard error, and traces where the environment says.

    Modules log with `log.info("event", extra={...})`; the extra fields become columns.
    Raises what `tracing.configure` raises.
    """
    tracing.configure(service)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(service, json, colors=sys.stderr.isatty()))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for noisy in ("uvicorn.access", "uvicorn.error", "httpx", "grpc"):
        logging.getLogger(noisy).setLevel("WARNING")


def bind(**ids: str | int) -> None:
    """Every further line of this task or thread tells these ids, and so does the current span."""
    bind_contextvars(**ids)
    tracing.describe(ids)


def bound_ids() -> dict[str, str | int]:
    """What is bound now: run, round, client, request_id, as far as they are known."""
    return get_contextvars()


def printable(text: str) -> str:
    """An id from a caller, cut and in ASCII: safe in a line, a terminal and a span."""
    return ascii(text[:_LONGEST])[1:-1]


def formatter(service: str, json: bool, colors: bool = False) -> logging.Formatter:
    def name_service(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        event.setdefault("service", service)
        return event

    shared: list[Processor] = [
        structlog.stdlib.ExtraAdder(),
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
        name_service,
        _name_trace,
        merge_contextvars,
        _drop_empty,
    ]
    # Tracebacks are plain: the renderer's own would show the values of local variables.
    last: list[Processor] = [
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
        structlog.processors.format_exc_info,
    ]
    if json:
        last.append(structlog.processors.JSONRenderer())
    else:
        last += [_escape, _console(colors)]
    return structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=last)


def _console(colors: bool) -> Processor:
    return structlog.dev.ConsoleRenderer(
        colors=colors,
        pad_event_to=32,
        timestamp_key="ts",
        exception_formatter=structlog.dev.plain_traceback,
    )


def _name_trace(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    event.setdefault("trace_id", tracing.trace_id())
    return event


def _drop_empty(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    event.pop("color_message", None)  # uvicorn's second rendering of the event, for terminals
    return {name: value for name, value in event.items() if value not in (None, "")}


def _escape(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """What callers sent may be in any text; in a terminal its control characters would act."""
    return {name: _escaped(name, value) for name, value in event.items()}


def _escaped(name: str, value: object) -> object:
    if not isinstance(value, str):
        return value
    kept = "\n\t" if name == "exception" else ""
    return "".join(char if char in kept or not _acts(char) else ascii(char)[1:-1] for char in value)


def _acts(char: str) -> bool:
    """Controls, marks that change the direction of writing, line separators, lone surrogates."""
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")
