"""Logs of every service: one line per event, for people or as JSON, with the same fields."""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger


def configure(service: str, json: bool = False, level: str = "info") -> None:
    """Sends the standard library's loggers to standard error.

    Modules log with `log.info("event", extra={...})`; the extra fields become columns.
    """

    def name_service(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        event.setdefault("service", service)
        return event

    def drop_empty(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        event.pop("color_message", None)  # uvicorn's second rendering of the event, for terminals
        return {name: value for name, value in event.items() if value not in (None, "")}

    shared: list[Processor] = [
        structlog.stdlib.ExtraAdder(),
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
        name_service,
        drop_empty,
    ]
    last: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if json:
        last += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        last += [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), pad_event_to=32, timestamp_key="ts"
            )
        ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=last)
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for noisy in ("uvicorn.access", "httpx", "grpc"):
        logging.getLogger(noisy).setLevel("WARNING")
