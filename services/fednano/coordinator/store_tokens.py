"""Bearer tokens in Redis: their SHA-256 hashes, never the secrets."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from dataclasses import asdict, replace

from fednano.coordinator import keys
from fednano.coordinator.database import Commit, Database
from fednano.coordinator.records import TokenRecord
from fednano.wire.errors import InvalidRequest, NotFound, Unauthenticated
from fednano.wire.sessions import Identity

ROLES = ("admin", "viewer", "site")
BOOTSTRAP = Identity(name="admin", role="admin", token_id="bootstrap")
_NAME_LENGTH = 128


class TokenStore:
    """Part of the Store. `admin_token` is accepted without being in Redis."""

    def __init__(self, database: Database, admin_token: str) -> None:
        self._db = database
        self._bootstrap = _digest(admin_token) if admin_token else ""

    async def create(self, name: str, role: str) -> tuple[TokenRecord, str]:
        """The record and the secret, which can't be read again."""
        if role not in ROLES:
            raise InvalidRequest.of("role", "admin, viewer or site", repr(role))
        if not name.strip() or len(name) > _NAME_LENGTH:
            raise InvalidRequest.of("name", f"1 to {_NAME_LENGTH} characters", repr(name))
        secret = "fn_" + secrets.token_urlsafe(32)
        record = TokenRecord(secrets.token_hex(6), name, role, self._db.clock())
        commit = Commit().expect(keys.TOKENS, record.id, "")
        commit.do("HSET", keys.TOKENS, record.id, json.dumps(asdict(record)))
        commit.do("HSET", keys.TOKEN_HASHES, _digest(secret), record.id)
        await self._db.commit(commit)
        return record, secret

    async def all(self) -> list[TokenRecord]:
        """Oldest first, revoked ones too."""
        found = await self._db.hash(keys.TOKENS)
        records = [TokenRecord(**json.loads(text)) for text in found.values()]
        return sorted(records, key=lambda record: (record.created_at, record.id))

    async def get(self, token_id: str) -> TokenRecord | None:
        text = await self._db.call("HGET", keys.TOKENS, token_id)
        return TokenRecord(**json.loads(text)) if text else None

    async def revoke(self, token_id: str) -> TokenRecord:
        """From now on the token is refused. Raises NotFound."""
        record = await self.get(token_id)
        if record is None:
            raise NotFound(f"no token has the id {token_id!r}")
        revoked = replace(record, revoked=True)
        await self._db.call("HSET", keys.TOKENS, token_id, json.dumps(asdict(revoked)))
        return revoked

    async def identify(self, secret: str) -> Identity:
        """Who holds this token. Raises Unauthenticated, never saying why."""
        digest = _digest(secret)
        if self._bootstrap and hmac.compare_digest(digest, self._bootstrap):
            return BOOTSTRAP
        names = [keys.TOKEN_HASHES, keys.TOKENS]
        text = await self._db.small_script("IDENTIFY", names, [digest])
        record = TokenRecord(**json.loads(text)) if text else None
        if record is None or record.revoked:
            raise Unauthenticated
        return Identity(name=record.name, role=record.role, token_id=record.id)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
