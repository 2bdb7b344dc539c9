"""Who is calling, and what each role may do."""

from __future__ import annotations

from fednano.coordinator.store import Store
from fednano.wire.errors import PermissionDenied, Unauthenticated
from fednano.wire.interceptors import caller
from fednano.wire.sessions import Identity

CLIENTS = ("site", "admin")
READERS = ("viewer", "site", "admin")
_LONGEST = 512


class Authenticator:
    """From a bearer token to its holder, for gRPC and REST. Nothing is remembered between calls,
    so a revoked token is refused from the next one on."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def authenticate(self, token: str) -> Identity:
        """Raises Unauthenticated, or Unavailable while the store is away."""
        if not token or len(token) > _LONGEST:
            raise Unauthenticated
        return await self._store.identify(token)


def require(roles: tuple[str, ...]) -> Identity:
    """The gRPC caller. Raises PermissionDenied for another role."""
    identity = caller()
    if identity.role not in roles:
        raise PermissionDenied
    return identity
