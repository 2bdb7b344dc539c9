"""Traces: where the time of a client's task went, across services (OpenTelemetry).

The usual OTEL_* variables ask for them. While they don't, nothing is imported and nothing is recorded.
Spans carry ids, durations and statuses; never tensors, texts, tokens or the words of an error.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc

from fednano import __version__
from fednano.wire.errors import FedNanoError, InvalidRequest

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, SpanKind

Ids = Mapping[str, str | int]
"""run, round, client, request_id: as far as they are known."""
Pairs = tuple[tuple[str, str], ...]

_OURS = "/fednano."
_QUIET = ("NextTask", "Heartbeat")  # they tell of waiting only, every few seconds
_SERVERS_FAULT = {  # the others are the caller's, by OpenTelemetry's conventions
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}
_EXPORT_SECONDS = 2.0
_provider: TracerProvider | None = None


def configure(service: str) -> None:
    """Records from now on, if the environment asks for it. Raises InvalidRequest if it can't."""
    global _provider
    if not _wanted():
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise InvalidRequest(
            "traces are asked for by OTEL_TRACES_EXPORTER or OTEL_EXPORTER_OTLP_ENDPOINT, but "
            "OpenTelemetry is not installed: pip install 'fednano[tracing]', or "
            "OTEL_TRACES_EXPORTER=none"
        ) from None
    ours = {
        "service.name": f"fednano-{service}",
        "service.version": __version__,
        "service.instance.id": socket.gethostname(),
    }
    resource = Resource.create(ours).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource)
    exporter = OTLPSpanExporter(timeout=_export_seconds())
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _provider = provider


def _wanted() -> bool:
    given = os.environ.get
    endpoint = given("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or given("OTEL_EXPORTER_OTLP_ENDPOINT")
    exporter = given("OTEL_TRACES_EXPORTER") or ("otlp" if endpoint else "none")
    if exporter == "none" or given("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if exporter != "otlp":
        raise InvalidRequest.of("OTEL_TRACES_EXPORTER", "otlp or none", repr(exporter))
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = given(name)
        if protocol and protocol != "grpc":
            raise InvalidRequest.of(name, "grpc", repr(protocol))
    return True


def _export_seconds() -> float | None:
    """Ours unless the environment sets it: OpenTelemetry's 10 s would hold up the end of a process
    whose collector is away for longer than containers are given."""
    names = ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT")
    return None if any(os.environ.get(name) for name in names) else _EXPORT_SECONDS


def stop() -> None:
    """Sends what was recorded and records no more. A process that ends does so by itself."""
    global _provider
    provider, _provider = _provider, None
    if provider is not None:
        provider.shutdown()


def on() -> bool:
    return _provider is not None


def describe(ids: Ids) -> None:
    """Puts ids on the span of what is being done now."""
    if _provider is not None:
        from opentelemetry import trace

        trace.get_current_span().set_attributes(_attributes(ids))


def trace_id() -> str:
    """Of what is being done now; empty where that is not recorded."""
    if _provider is None:
        return ""
    from opentelemetry import trace

    current = trace.get_current_span().get_span_context()
    return trace.format_trace_id(current.trace_id) if current.trace_flags.sampled else ""


@contextmanager
def working(name: str, ids: Ids) -> Iterator[None]:
    """Around a piece of work of this thread: calls that it makes become parts of its span."""
    if _provider is None:
        yield
        return
    from opentelemetry import trace

    span = _begin(name, trace.SpanKind.INTERNAL, _attributes(ids))
    with trace.use_span(span, record_exception=False, set_status_on_exception=False), _ended(span):
        yield


@contextmanager
def calling(method: str, ids: Ids) -> Iterator[Pairs]:
    """Around one try of a call; yields the metadata that makes the service's span a part of ours.

    The span is never the current one, so that it may be held open by a generator.
    """
    if _provider is None or method.endswith(_QUIET):
        yield ()
        return
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    span = _begin(method, trace.SpanKind.CLIENT, _rpc(method) | _attributes(ids))
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, trace.set_span_in_context(span))
    with _ended(span, rpc=True):
        yield tuple(carrier.items())


@contextmanager
def serving(method: str, metadata: Mapping[str, Any], ids: Ids) -> Iterator[None]:
    """Around a call that is served: a part of the caller's span, where it sent one."""
    if _provider is None or not method.startswith(_OURS) or method.endswith(_QUIET):
        yield
        return
    from opentelemetry import context, trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    parent = TraceContextTextMapPropagator().extract(metadata)
    span = _begin(method, trace.SpanKind.SERVER, _rpc(method) | _attributes(ids), parent)
    context.attach(trace.set_span_in_context(span))  # of the call's own task: nothing to put back
    with _ended(span, rpc=True, faults=_SERVERS_FAULT):
        yield


def for_fastapi(quiet_paths: tuple[str, ...]) -> Any:
    """FastAPI's `telemetry`: a span for each request, but those that only look or last for hours."""
    if _provider is None:
        return {"tracing": False, "auto_configure": False}

    def quiet(scope: Any) -> bool:
        path: str = scope["path"]
        return path.startswith(quiet_paths) or path.endswith("/events")

    return {
        "tracer_provider": _provider,
        "operation_spans": False,
        "metrics": False,
        "logs": False,
        "auto_configure": False,
        "exclude": quiet,
    }


def _begin(name: str, kind: SpanKind, attributes: dict[str, str | int], parent: Any = None) -> Span:
    assert _provider is not None
    tracer = _provider.get_tracer("fednano", __version__)
    return tracer.start_span(name.lstrip("/"), parent, kind, attributes)


@contextmanager
def _ended(
    span: Span, rpc: bool = False, faults: set[grpc.StatusCode] | None = None
) -> Iterator[None]:
    """Ends the span with what became of the work; without `faults` every error is one."""
    from opentelemetry.trace import StatusCode

    status = grpc.StatusCode.OK
    try:
        yield
    except (asyncio.CancelledError, GeneratorExit):  # whoever wanted it has gone
        status = grpc.StatusCode.CANCELLED
        raise
    except BaseException as error:
        status = error.status if isinstance(error, FedNanoError) else grpc.StatusCode.INTERNAL
        span.set_attribute("error.type", type(error).__name__)
        if faults is None or status in faults:
            span.set_status(StatusCode.ERROR)
        raise
    finally:
        if rpc:
            code: int = status.value[0]
            span.set_attribute("rpc.grpc.status_code", code)
        span.end()


def _attributes(ids: Ids) -> dict[str, str | int]:
    return {f"fednano.{name}": value for name, value in ids.items()}


def _rpc(method: str) -> dict[str, str | int]:
    service, _, name = method.lstrip("/").rpartition("/")
    return {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
