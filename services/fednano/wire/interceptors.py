"""What surrounds every call of our asyncio gRPC servers: logs, errors to statuses, authentication,
traces."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import grpc

from fednano import logs, tracing
from fednano.wire.errors import FedNanoError, Unauthenticated, to_metadata
from fednano.wire.headers import ids_of
from fednano.wire.sessions import Identity
from fednano.wire.tensor_pb2 import Header

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]
    Context = grpc.aio.ServicerContext[Any, Any]
else:
    Handler, Context = grpc.RpcMethodHandler, grpc.aio.ServicerContext
Around = Callable[[Any, Context, Any], AbstractAsyncContextManager[Any]]
"""Entered with a call's request, or iterator of requests, its context and gRPC's details of it; gives
what the method gets in the request's place."""
Authenticate = Callable[[str], Awaitable[Identity]]
"""From a bearer token to who it is; raises Unauthenticated."""

PUBLIC_SERVICES = ("/grpc.health.v1.Health/",)
_caller: ContextVar[Identity] = ContextVar("caller")


def caller() -> Identity:
    """Who made the call that is being served."""
    return _caller.get()


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """Call metadata that carries a bearer token."""
    return (("authorization", f"Bearer {token}"),)


def read_bearer(value: str | bytes | None) -> str:
    """The token in an Authorization value; raises Unauthenticated."""
    text = value.decode("latin-1") if isinstance(value, bytes) else value or ""
    scheme, _, token = text.partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated
    return token


async def _surrounded(continuation: Any, details: Any, around: Around) -> Handler:
    """What would have served the call, with `around` entered for its length."""
    handler: Handler = await continuation(details)
    return handler if handler is None else _surround(handler, details, around)


def _surround(handler: Handler, details: Any, around: Around) -> Handler:
    inner: Any = (
        handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    )

    async def reply(request: Any, context: Context) -> Any:
        async with around(request, context, details) as given:
            return await inner(given, context)

    async def replies(request: Any, context: Context) -> AsyncIterator[Any]:
        # The inner generator is closed with the call, so that one who hangs up is noticed at once.
        async with (
            around(request, context, details) as given,
            aclosing(inner(given, context)) as messages,
        ):
            async for message in messages:
                yield message

    kind = ("stream" if handler.request_streaming else "unary") + (
        "_stream" if handler.response_streaming else "_unary"
    )
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    # A streaming method may also be a coroutine that writes to the context (health's Watch).
    outer = replies if inspect.isasyncgenfunction(inner) else reply
    made: Handler = make(
        outer,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
    return made


class _Introduced:
    """A stream of requests that tells of its first message, once that has been read."""

    def __init__(self, requests: AsyncIterator[Any], tell: Callable[[Any], None]) -> None:
        self._requests = requests
        self._tell: Callable[[Any], None] | None = tell

    def __aiter__(self) -> _Introduced:
        return self

    async def __anext__(self) -> Any:
        message = await anext(self._requests)
        if self._tell is not None:
            self._tell(message)
            self._tell = None
        return message


def _ids(message: Any) -> dict[str, str | int]:
    """What a request tells of itself; in a stream that is the first message's head."""
    header = getattr(getattr(message, "head", message), "header", None)
    return ids_of(header) if isinstance(header, Header) else {}


class LogInterceptor(grpc.aio.ServerInterceptor):
    """Every line that is written while a call is served tells whose call it is; at its end, one at
    DEBUG tells how it went."""

    async def intercept_service(self, continuation: Any, details: Any) -> Handler:
        return await _surrounded(continuation, details, self._told)

    @asynccontextmanager
    async def _told(self, request: Any, context: Context, details: Any) -> AsyncIterator[Any]:
        started = time.perf_counter()
        known: dict[str, str | int] = {"rpc": details.method}

        def tell(message: Any) -> None:
            ids = _ids(message)
            logs.bind(**ids)  # of this call's own task, so there is nothing to put back
            known.update(ids)

        if hasattr(request, "__aiter__"):
            request = _Introduced(request, tell)
        else:
            tell(request)
        try:
            yield request
        except (asyncio.CancelledError, GeneratorExit):
            known["status"] = grpc.StatusCode.CANCELLED.name
            raise
        finally:
            # Of one who hung up another task may be cleaning up, which knows no ids.
            status = (context.code() or grpc.StatusCode.OK).name
            seconds = round(time.perf_counter() - started, 4)
            log.debug("call served", extra={"seconds": seconds, "status": status, **known})


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns our errors into statuses, and anything else into INTERNAL without its text."""

    async def intercept_service(self, continuation: Any, details: Any) -> Handler:
        return await _surrounded(continuation, details, self._guard)

    @asynccontextmanager
    async def _guard(self, request: Any, context: Context, details: Any) -> AsyncIterator[Any]:
        try:
            yield request
        except FedNanoError as error:
            # Whoever has no token could fill the log.
            level = logging.DEBUG if isinstance(error, Unauthenticated) else logging.INFO
            extra = {"rpc": details.method, "reason": error.detail, **logs.bound_ids()}
            log.log(level, "request refused", extra=extra)
            await context.abort(error.status, error.detail, to_metadata(error))
        except (grpc.aio.AbortError, asyncio.CancelledError, GeneratorExit):
            raise
        except Exception:
            log.exception("request failed", extra={"rpc": details.method, **logs.bound_ids()})
            await context.abort(grpc.StatusCode.INTERNAL, "internal error; see the service's log")


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call without a valid token, but health."""

    def __init__(self, authenticate: Authenticate) -> None:
        self._authenticate = authenticate

    async def intercept_service(self, continuation: Any, details: Any) -> Handler:
        handler: Handler = await continuation(details)
        if details.method.startswith(PUBLIC_SERVICES):
            return handler
        # An unknown method is refused like a known one: no hint of what exists.
        target = handler or grpc.unary_unary_rpc_method_handler(_no_such_method)
        return _surround(target, details, self._enter)

    @asynccontextmanager
    async def _enter(self, request: Any, _: Context, details: Any) -> AsyncIterator[Any]:
        metadata = _metadata(details)
        identity = await self._authenticate(read_bearer(metadata.get("authorization")))
        _caller.set(identity)  # of this call's own task, so there is nothing to put back
        yield request


class TraceInterceptor(grpc.aio.ServerInterceptor):
    """A span for each call. Innermost: whoever has no token must not fill the traces."""

    async def intercept_service(self, continuation: Any, details: Any) -> Handler:
        return await _surrounded(continuation, details, self._traced)

    @asynccontextmanager
    async def _traced(self, request: Any, _: Context, details: Any) -> AsyncIterator[Any]:
        with tracing.serving(details.method, _metadata(details), logs.bound_ids()):
            yield request


def _metadata(details: Any) -> dict[str, str | bytes]:
    return dict(details.invocation_metadata or ())


async def _no_such_method(_: Any, context: Context) -> Any:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no such method")
