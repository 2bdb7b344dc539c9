"""What surrounds every call of our asyncio gRPC servers: authentication, and errors to statuses."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import grpc

from fednano.wire.errors import FedNanoError, Unauthenticated, to_metadata
from fednano.wire.sessions import Identity
from fednano.wire.tensor_pb2 import Header

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]
    Context = grpc.aio.ServicerContext[Any, Any]
else:
    Handler, Context = grpc.RpcMethodHandler, grpc.aio.ServicerContext
Around = Callable[[Any, Context], AbstractAsyncContextManager[None]]
Authenticate = Callable[[str], Awaitable[Identity]]
"""From a bearer token to who it is; raises Unauthenticated."""

PUBLIC_SERVICES = ("/grpc.health.v1.Health/",)
_LONGEST = 128  # characters of a header's field in the log
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


def _surround(handler: Handler, around: Around) -> Handler:
    """The same handler with `around` entered for the length of each call."""
    inner: Any = (
        handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    )

    async def reply(request: Any, context: Context) -> Any:
        async with around(request, context):
            return await inner(request, context)

    async def replies(request: Any, context: Context) -> AsyncIterator[Any]:
        # The inner generator is closed with the call, so that one who hangs up is noticed at once.
        async with around(request, context), aclosing(inner(request, context)) as messages:
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


def _about(request: Any) -> dict[str, object]:
    """What a request's header tells, for the log; nothing of a stream of requests."""
    header = getattr(request, "header", None)
    if not isinstance(header, Header):
        return {}
    texts = {"run": header.run, "client": header.client, "request_id": header.request}
    shown = {name: ascii(text[:_LONGEST])[1:-1] for name, text in texts.items()}
    return {**shown, "round": header.round or None}


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns our errors into statuses, and anything else into INTERNAL without its text."""

    async def intercept_service(self, continuation: Any, details: Any) -> Handler:
        handler: Handler = await continuation(details)
        if handler is None:
            return handler
        return _surround(
            handler, lambda request, context: self._guard(request, context, details.method)
        )

    @asynccontextmanager
    async def _guard(self, request: Any, context: Context, method: str) -> AsyncIterator[None]:
        try:
            yield
        except FedNanoError as error:
            # Whoever has no token could fill the log.
            level = logging.DEBUG if isinstance(error, Unauthenticated) else logging.INFO
            extra = {"rpc": method, "reason": error.detail, **_about(request)}
            log.log(level, "request refused", extra=extra)
            await context.abort(error.status, error.detail, to_metadata(error))
        except (grpc.aio.AbortError, asyncio.CancelledError, GeneratorExit):
            raise
        except Exception:
            log.exception("request failed", extra={"rpc": method, **_about(request)})
            await context.abort(grpc.StatusCode.INTERNAL, "internal error; see the service's log")


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call without a valid token, but health."""

    def __init__(self, authenticate: Authenticate) -> None:
        self._authenticate = authenticate

    async def intercept_service(self, continuation: Any, details: Any) -> Handler:
        handler: Handler = await continuation(details)
        if details.method.startswith(PUBLIC_SERVICES):
            return handler
        metadata = dict(details.invocation_metadata or ())
        # An unknown method is refused like a known one: no hint of what exists.
        target = handler or grpc.unary_unary_rpc_method_handler(_no_such_method)
        return _surround(target, lambda *_: self._enter(metadata))

    @asynccontextmanager
    async def _enter(self, metadata: dict[str, str | bytes]) -> AsyncIterator[None]:
        identity = await self._authenticate(read_bearer(metadata.get("authorization")))
        _caller.set(identity)  # of this call's own task, so there is nothing to put back
        yield


async def _no_such_method(_: Any, context: Context) -> Any:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no such method")
