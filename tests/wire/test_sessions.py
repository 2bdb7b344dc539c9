"""Tokens for the LLM service: signed by one key, checked by the other."""

from __future__ import annotations

from pathlib import Path

import pytest
from fednano.wire.errors import InvalidRequest, Unauthenticated
from fednano.wire.sessions import (
    Identity,
    SessionSigner,
    SessionVerifier,
    make_keys,
    public_key,
    write_keys,
)

PRIVATE, PUBLIC = make_keys()
SITE = Identity("client-1", "site", "run")


def test_what_was_signed_is_read() -> None:
    token, expires = SessionSigner(PRIVATE).issue(SITE)
    assert SessionVerifier(PUBLIC).verify(token) == SITE
    assert expires > 0


def test_another_key_is_refused() -> None:
    token, _ = SessionSigner(make_keys()[0]).issue(SITE)
    with pytest.raises(Unauthenticated):
        SessionVerifier(PUBLIC).verify(token)


def test_an_expired_token_is_said_so() -> None:
    token, _ = SessionSigner(PRIVATE, ttl_seconds=-5).issue(SITE)
    with pytest.raises(Unauthenticated, match="expired"):
        SessionVerifier(PUBLIC).verify(token)


def test_a_token_that_was_good_expires_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    token, expires = SessionSigner(PRIVATE, ttl_seconds=60).issue(SITE)
    verifier = SessionVerifier(PUBLIC)
    assert verifier.verify(token) == SITE
    monkeypatch.setattr("fednano.wire.sessions.time.time", lambda: expires / 1000 - 0.01)
    assert verifier.verify(token) == SITE
    monkeypatch.setattr("fednano.wire.sessions.time.time", lambda: expires / 1000)
    with pytest.raises(Unauthenticated, match="expired"):
        verifier.verify(token)


def test_keys_that_are_there_are_kept(tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    first = private.read_bytes()
    public.unlink()
    write_keys(tmp_path)
    assert private.read_bytes() == first
    assert public.read_bytes() == public_key(first)
    assert private.stat().st_mode & 0o777 == 0o600


def test_what_is_no_key_is_said_so() -> None:
    with pytest.raises(InvalidRequest, match="session key: expected an Ed25519 private key"):
        public_key(b"not a key")


def test_while_keys_are_changed_tokens_of_both_are_good() -> None:
    new_private, new_public = make_keys()
    verifier = SessionVerifier(PUBLIC + new_public)
    for private in (PRIVATE, new_private):
        assert verifier.verify(SessionSigner(private).issue(SITE)[0]) == SITE
    with pytest.raises(Unauthenticated):
        verifier.verify(SessionSigner(make_keys()[0]).issue(SITE)[0])


@pytest.mark.parametrize("pem", [b"", b"a secret", PRIVATE, PUBLIC.replace(b"M", b"!")])
def test_what_is_no_public_key_is_said_so_without_repeating_it(pem: bytes) -> None:
    with pytest.raises(InvalidRequest, match=f"session_public_key.* {len(pem)} other bytes") as no:
        SessionVerifier(pem)
    assert "secret" not in no.value.detail
