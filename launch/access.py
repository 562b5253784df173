"""Reaching a Ray cluster: whether anything answers at an address, and the token that Ray asks for.

Ray gives a cluster it starts a token, in `~/.ray/auth_token`, and looks for it there when it finds a cluster of this
machine by itself. To an address that a person names it sends nothing unless told to, so that no token leaks.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

TOKEN_FIX = "if the cluster asks for a token: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN=... (`ray get-auth-token` there)"


def running_here() -> str | None:
    """Address of the cluster that `ray start` started on this machine, if it still answers.

    Asked of the port and not of Ray, which takes a minute to find that a cluster is gone, and which may also join
    one that another program started for itself.
    """
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    try:
        address = file.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return address if answers(address) else None


def answers(address: str) -> bool:
    """Whether something listens at `host:port`; an address of another form is left to Ray."""
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not port.isdecimal():
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def offer_token(address: str) -> None:
    """Lets Ray, not yet imported, send a token: one that the environment names, or this machine's own to itself."""
    named = bool(os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"))
    host = address.partition("://")[2] or address
    here = host.rpartition(":")[0].strip("[]") in ("127.0.0.1", "localhost", "::1")
    if named or (here and _token_file().exists()):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def protect_token() -> None:
    """Ray writes the token so that every user of the machine can read it."""
    with contextlib.suppress(OSError):
        _token_file().chmod(0o600)


def _token_file() -> Path:
    return Path.home() / ".ray" / "auth_token"
