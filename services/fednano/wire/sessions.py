"""Short-lived signed tokens that the coordinator issues and the LLM service verifies by key.

Ed25519: the LLM service holds the public key only, so that it can check tokens but not make any.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from fednano.wire.errors import InvalidRequest, Unauthenticated

_ALGORITHM = "EdDSA"
_AUDIENCE = "fednano-llm"
_EXPIRED = "the session token has expired"
_REMEMBERED = 4096  # tokens: so many callers at a time, and then some
_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----", re.DOTALL)


@dataclass(frozen=True)
class Identity:
    """Who is calling."""

    name: str  # of the token on the coordinator, of the client on the LLM service
    role: str  # admin, viewer or site
    run: str = ""
    token_id: str = ""


class SessionSigner:
    """Issues tokens; held by the coordinator."""

    def __init__(self, private_pem: bytes, ttl_seconds: float = 900) -> None:
        self._key = private_pem
        self.ttl_seconds = ttl_seconds

    def issue(self, identity: Identity) -> tuple[str, int]:
        """A token for `identity` and the Unix time in milliseconds at which it expires."""
        now = time.time()
        expires = int(now + self.ttl_seconds)
        claims = {
            "sub": identity.name,
            "role": identity.role,
            "run": identity.run,
            "aud": _AUDIENCE,
            "iat": int(now),
            "exp": expires,
        }
        return jwt.encode(claims, self._key, algorithm=_ALGORITHM), expires * 1000


class SessionVerifier:
    """Checks tokens; held by the LLM service."""

    def __init__(self, public_pem: bytes) -> None:
        """One public key or several, one PEM block after the other: while keys are changed, tokens
        of the old one are still good. Raises InvalidRequest, which repeats nothing of the bytes."""
        try:
            found = [load_pem_public_key(block) for block in _PEM.findall(public_pem)]
        except ValueError:
            found = []
        self._keys = [key for key in found if isinstance(key, Ed25519PublicKey)]
        if not self._keys or len(self._keys) < len(found):
            wanted = "Ed25519 public keys in PEM form"
            raise InvalidRequest.of("session_public_key", wanted, f"{len(public_pem)} other bytes")
        self._signed = lru_cache(_REMEMBERED)(self._checked)  # what raises is not kept

    def verify(self, token: str) -> Identity:
        """Raises Unauthenticated, saying no more than whether the token has expired.

        A signature is checked once: that takes as long as the rest of a small call.
        """
        identity, expires = self._signed(token)
        if time.time() >= expires:
            raise Unauthenticated(_EXPIRED)
        return identity

    def _checked(self, token: str) -> tuple[Identity, float]:
        """Who a token is for, and until when. Raises Unauthenticated."""
        for key in self._keys:
            try:
                claims = jwt.decode(
                    token,
                    key,
                    algorithms=[_ALGORITHM],
                    audience=_AUDIENCE,
                    options={"require": ["exp", "sub", "role", "run"]},
                )
            except jwt.ExpiredSignatureError:
                raise Unauthenticated(_EXPIRED) from None
            except jwt.InvalidSignatureError:
                continue
            except jwt.InvalidTokenError:
                raise Unauthenticated from None
            identity = Identity(name=claims["sub"], role=claims["role"], run=claims["run"])
            return identity, float(claims["exp"])
        raise Unauthenticated


def make_keys() -> tuple[bytes, bytes]:
    """A new private and public key, PEM."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return private, public_key(private)


def public_key(private_pem: bytes) -> bytes:
    """The public half of a private key, PEM. Raises InvalidRequest where it is no Ed25519 key."""
    try:
        key = serialization.load_pem_private_key(private_pem, password=None)
    except ValueError as error:
        raise InvalidRequest.of("session key", "an Ed25519 private key (PEM)", error) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidRequest.of("session key", "an Ed25519 private key", type(key).__name__)
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def write_keys(folder: Path) -> tuple[Path, Path]:
    """Writes session.key (mode 0600) and session.pub into `folder`; a private key that is there
    already is kept, and its public half written again."""
    folder.mkdir(parents=True, exist_ok=True)
    private_path, public_path = folder / "session.key", folder / "session.pub"
    if not private_path.exists():
        private_path.touch(mode=0o600)
        private_path.write_bytes(make_keys()[0])
    public_path.write_bytes(public_key(private_path.read_bytes()))
    return private_path, public_path
