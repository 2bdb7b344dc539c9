"""What `fednano client` prints."""

from __future__ import annotations

import logging

import pytest
from fednano.client.cli import Meanwhile


def test_a_service_that_is_asked_again_is_one_line_like_a_finding(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = logging.getLogger("fednano.client.somewhere")
    with Meanwhile():
        log.warning("the LLM service is asked again", extra={"reason": "not\n[bold]yet " * 20})
        log.info("something else")
    log.warning("no longer")
    out, err = capsys.readouterr()
    assert not out
    assert err == f"... the LLM service is asked again: {('not [bold]yet ' * 20).strip()}\n"
