"""Logins for registries: from Docker's configuration, its helpers, and the file that skopeo and podman write.

Sources: docs.docker.com, `docker login` (config.json, credential stores); containers-auth.json(5).
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluxkiln.documents import SMALL, read_object_file
from fluxkiln.errors import RegistryError

HELPER_SECONDS = 30
# What Docker calls its own registry in that file.
_DOCKER_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")
_HELPER = re.compile(r"[A-Za-z0-9._-]+")
_TOKEN_USER = "<token>"


@dataclass(frozen=True, slots=True)
class Credential:
    """User and password, or an identity token to be exchanged; nothing of it is ever shown."""

    user: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)

    def basic(self) -> str:
        """As an Authorization header has it."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


def find_credential(host: str, seconds: float = math.inf) -> Credential | None:
    """The credential for a registry, or None when the user has logged in nowhere like it.

    Looked for in `$DOCKER_CONFIG/config.json` or `~/.docker/config.json`: the host's own helper, the store, then the
    file itself; then in the file that skopeo and podman write.

    Args:
        seconds: that helpers may take together; one alone may take HELPER_SECONDS.

    Raises RegistryError: a file that cannot be read, or a helper that fails.
    """
    names = (host, f"https://{host}", f"https://{host}/v2/", f"http://{host}")
    if host in _DOCKER_HUB:
        names = ("https://index.docker.io/v1/", *_DOCKER_HUB)
    end = time.monotonic() + seconds
    files = [Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker", "config.json")]
    if auth_file := os.environ.get("REGISTRY_AUTH_FILE"):
        files.append(Path(auth_file))
    elif runtime := os.environ.get("XDG_RUNTIME_DIR"):
        files.append(Path(runtime, "containers", "auth.json"))
    for path in files:
        if not path.is_file():
            continue
        config = read_object_file(path, error=RegistryError, remedy="put it right or log in again", limits=SMALL)
        helpers, auths = (config.get(key) or {} for key in ("credHelpers", "auths"))
        asked = [(helpers.get(name), name) for name in names] if isinstance(helpers, Mapping) else []
        for helper, name in [*asked, *((config.get("credsStore"), name) for name in names)]:
            if isinstance(helper, str) and (found := _ask(helper, name, end)) is not None:
                return found
        for name in names if isinstance(auths, Mapping) else ():
            if isinstance(entry := auths.get(name), Mapping) and (found := _entry(entry, path, name)) is not None:
                return found
    return None


def _entry(entry: Mapping[str, Any], path: Path, name: str) -> Credential | None:
    token = entry.get("identitytoken")
    if isinstance(token, str) and token:
        return Credential(identity_token=token)
    auth = entry.get("auth")
    if not isinstance(auth, str) or not auth:
        return None
    try:
        user, colon, password = base64.b64decode(auth, validate=True).decode().partition(":")
    except ValueError:  # no base64, no ASCII, no UTF-8
        colon = ""
    if not colon:
        raise RegistryError(f"{path} has no usable entry for {name}; log in again: docker login {name}")
    return Credential(user, password)


def _ask(helper: str, name: str, end: float) -> Credential | None:
    """What a helper knows; its protocol is the host on stdin and JSON on stdout."""
    if not _HELPER.fullmatch(helper):
        raise RegistryError(f"the credential helper {helper!r} has no legal name; put Docker's config.json right")
    program = f"docker-credential-{helper}"
    seconds = min(HELPER_SECONDS, max(end - time.monotonic(), 0.0))
    try:
        done = subprocess.run(
            [program, "get"], input=name, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
        )
    except FileNotFoundError:
        raise RegistryError(f"{program} is not installed, Docker's config.json names it; install it or log in "
                            "without it") from None  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RegistryError(
            f"{program} did not answer for {name} in {seconds:.0f} s; unlock it and try again"
        ) from None
    if done.returncode:
        # Its way to say that it has nothing; the sentence goes to stdout.
        if "not found" in done.stdout.lower() or "no credentials" in done.stdout.lower():
            return None
        raise RegistryError(f"{program} failed for {name} (exit code {done.returncode}); unlock it or log in again")
    try:
        answer = json.loads(done.stdout)
        user, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RegistryError(f"{program} answered no credential for {name}; log in again") from None
    return Credential(identity_token=secret) if user == _TOKEN_USER else Credential(user, secret)
