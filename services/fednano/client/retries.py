"""How a client insists: the same request again, with jittered back-off, for a bounded time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_delay,
    wait_random_exponential,
)

from fednano.wire.errors import RETRYABLE

T = TypeVar("T")


def retried(call: Callable[[], T], seconds: float, note: Callable[[BaseException], None]) -> T:
    """`call()`, again after each retryable error until `seconds` are over; then raises that error.

    `note` is told of every error that is followed by another try.
    """

    def before_sleep(state: RetryCallState) -> None:
        error = state.outcome and state.outcome.exception()
        assert isinstance(error, BaseException)
        note(error)

    policy = Retrying(
        retry=retry_if_exception_type(RETRYABLE),
        stop=stop_after_delay(seconds),
        wait=wait_random_exponential(multiplier=0.1, max=5),
        before_sleep=before_sleep,
        reraise=True,
    )
    return policy(call)
