"""The coordinator's REST as the command line calls it: settings, errors, pages and the event stream.

The token comes from FEDNANO_TOKEN, FEDNANO_TOKEN_FILE or --token-file, the address from FEDNANO_URL
or --url. A token never leaves this machine in the clear unless somebody said so.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.parse import quote, urlsplit

import httpx
from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from fednano import __version__
from fednano.settings import Settings
from fednano.wire.channels import check_exposure
from fednano.wire.errors import FedNanoError, InvalidRequest, Problem, Unauthenticated, Unavailable

_API = "/api/v1"
_PAGE = 500
_HEARTBEATS_MISSED = 45.0  # seconds without a sign of the stream: three heartbeats


class RestSettings(Settings):
    """Where the coordinator is, and who is asking."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, env_prefix="FEDNANO_")
    service: ClassVar[str] = "cli"

    url: str = Field("http://127.0.0.1:8080", description="the coordinator's HTTP address")
    token: SecretStr = Field(SecretStr(""), description="bearer token")
    ca: Path | None = Field(None, description="CA certificate (PEM) that signs the coordinator's")
    insecure: bool = Field(False, description="send the token in the clear beyond this machine")


class Refused(FedNanoError):
    """The coordinator answered with a problem; `status` is HTTP's."""

    def __init__(self, code: int, detail: str, *problems: Problem) -> None:
        super().__init__(detail, *problems)
        self.code = code


@dataclass(frozen=True)
class StreamEvent:
    """One server-sent event."""

    id: str
    kind: str
    data: dict[str, Any]


class RestClient:
    """Calls that return replies as plain values and raise Refused or Unavailable."""

    def __init__(
        self, settings: RestSettings, transport: httpx.BaseTransport | None = None
    ) -> None:
        address = urlsplit(settings.url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise InvalidRequest.of("url", "http://HOST:PORT or https://HOST:PORT", settings.url)
        secure = True if address.scheme == "https" else None
        check_exposure("url", address.hostname, secure, settings.insecure)
        if not settings.token.get_secret_value():
            raise Unauthenticated(
                "no token: set FEDNANO_TOKEN or FEDNANO_TOKEN_FILE, or give --token-file"
            )
        self._http = httpx.Client(
            base_url=settings.url.rstrip("/") + _API,
            headers={
                "Authorization": f"Bearer {settings.token.get_secret_value()}",
                "User-Agent": f"fednano/{__version__}",
            },
            verify=_verification(settings.ca),
            timeout=httpx.Timeout(30.0, connect=5.0),
            transport=transport,
            trust_env=False,  # no proxy gets to see the token
        )

        self.page = _PAGE

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str, **query: str | int) -> Any:
        return self._call("GET", path, query=query)

    def post(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """The status and the reply."""
        reply = self._send("POST", path, body=body)
        return reply.status_code, reply.json()

    def delete(self, path: str) -> Any:
        return self._call("DELETE", path)

    def download(self, path: str) -> bytes:
        """A body that is not JSON."""
        return self._send("GET", path).content

    def items(self, path: str) -> list[dict[str, Any]]:
        """All items of a paged list."""
        found: list[dict[str, Any]] = []
        cursor = ""
        while True:
            page = self.get(path, cursor=cursor, limit=self.page)
            found += page["items"]
            cursor = page["next"]
            if not cursor:
                return found

    def events(self, run: str, after: str) -> Iterator[StreamEvent | None]:
        """Events after an id; None for each sign of life in between. Ends with the connection."""
        timeout = httpx.Timeout(5.0, read=_HEARTBEATS_MISSED)
        path = f"{run_path(run)}/events"
        query = {"after": after}
        try:
            with self._http.stream("GET", path, params=query, timeout=timeout) as reply:
                if reply.is_error:
                    reply.read()
                    raise _refusal(reply)
                yield from read_events(reply.iter_lines())
        except httpx.TransportError as error:
            raise _unreachable(self._http.base_url, error) from None

    def _call(self, method: str, path: str, query: dict[str, Any] | None = None) -> Any:
        return self._send(method, path, query=query).json()

    def _send(
        self,
        method: str,
        path: str,
        *,
        query: dict[str, Any] | None = None,
        body: dict[str, Any] | None = None,
    ) -> httpx.Response:
        try:
            reply = self._http.request(method, path, params=query, json=body)
        except httpx.TransportError as error:
            raise _unreachable(self._http.base_url, error) from None
        if not reply.is_success:
            raise _refusal(reply)
        return reply


def run_path(run: str) -> str:
    return f"/runs/{quote(run, safe='')}"


def _verification(ca: Path | None) -> ssl.SSLContext | bool:
    if ca is None:
        return True
    try:
        return ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        raise InvalidRequest.of("ca", "a readable PEM file", f"{ca} ({error})") from None


def _unreachable(url: httpx.URL, error: httpx.TransportError) -> Unavailable:
    return Unavailable(f"no answer from {url.scheme}://{url.netloc.decode()}: {error}")


def _refusal(reply: httpx.Response) -> Refused:
    """The problem that the coordinator named, or the bare status of whatever is in between."""
    try:
        body = reply.json()
        problems = [Problem(**item) for item in body["errors"]]
        return Refused(reply.status_code, str(body["detail"]), *problems)
    except (ValueError, KeyError, TypeError):
        return Refused(reply.status_code, f"{reply.url} answered {reply.status_code}")


def read_events(lines: Iterable[str]) -> Iterator[StreamEvent | None]:
    """Parses server-sent events; None for every comment."""
    fields: dict[str, str] = {}
    for line in lines:
        if line.startswith(":"):
            yield None
        elif line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
        else:
            if "data" in fields:
                data = json.loads(fields["data"])
                yield StreamEvent(fields.get("id", ""), fields.get("event", "message"), data)
            fields = {}
