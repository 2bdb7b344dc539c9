"""Makes the clients' token and puts it into the Secret `site-token`; a Job runs it (token.yaml).

One that the coordinator still accepts is kept. Only the standard library and `fednano`.
"""

import base64
import json
import os
import ssl
import subprocess
import time
import urllib.request
from pathlib import Path

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
KEY = "site.token"
SECONDS = 600


def site_secret(method: str, body: dict | None = None) -> dict:
    """Reads (GET) or changes (PATCH) the Secret."""
    namespace = (ACCOUNT / "namespace").read_text().strip()
    request = urllib.request.Request(
        f"https://kubernetes.default.svc/api/v1/namespaces/{namespace}/secrets/site-token",
        data=None if body is None else json.dumps(body).encode(),
        headers={
            "Authorization": f"Bearer {(ACCOUNT / 'token').read_text().strip()}",
            "Content-Type": "application/merge-patch+json",
        },
        method=method,
    )
    context = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    with urllib.request.urlopen(request, context=context, timeout=30) as reply:
        return json.load(reply)


def fednano(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["fednano", *arguments], env=os.environ | environment, capture_output=True, text=True
    )


def accepted(token: str) -> bool:
    return bool(token) and fednano("runs", "list", FEDNANO_TOKEN=token).returncode == 0


def wait_for_coordinator() -> None:
    """With an administrator's call, so that afterwards a refusal is a refusal."""
    until = time.monotonic() + SECONDS
    while (reply := fednano("runs", "list")).returncode != 0:
        if time.monotonic() > until:
            raise SystemExit(reply.stderr)
        time.sleep(3)


def main() -> None:
    wait_for_coordinator()
    held = (site_secret("GET").get("data") or {}).get(KEY, "")
    if accepted(base64.b64decode(held).decode()):
        print("the token in the Secret is good")
        return
    reply = fednano("tokens", "create", "cluster", "--role", "site")
    if reply.returncode != 0:
        raise SystemExit(reply.stderr)
    token = base64.b64encode(reply.stdout.strip().encode()).decode()
    site_secret("PATCH", {"data": {KEY: token}})
    print("a new token is in the Secret")


if __name__ == "__main__":
    main()
