# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Who may come in, and the pages of plain HTTP on the server's port."""

from __future__ import annotations

import hmac
import http
import ipaddress
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

__all__ = ["Gate", "is_loopback"]


class Gate:
    """Looks at each HTTP request: answers it, refuses it, or lets a websocket in.

    ``/healthz`` says ``OK`` to everybody, as OpenPI's; ``/health`` and the websocket
    ask for the token, where there is one.

    Args:
        token (str, optional): what clients must send.
        health (callable): what ``/health`` shows.
        errors (Counter): where refusals are counted.

    Raises:
        ValueError: for a token that cannot be sent in a header.
    """

    def __init__(
        self,
        token: str | None,
        health: Callable[[], dict[str, Any]],
        errors: Counter[str],
    ) -> None:
        if token is not None and not (token.isascii() and token.strip() == token != ""):
            raise ValueError("The token must be ASCII, without spaces around it.")
        self.token = token
        self._health = health
        self._errors = errors

    @property
    def open(self) -> bool:
        """Whether everybody may come in."""
        return self.token is None

    def __call__(self, connection: Any, request: Any) -> Any:
        """What to answer; None lets the websocket in."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if not self._authorised(request.headers):
            self._errors["Unauthorized"] += 1
            refusal = connection.respond(
                http.HTTPStatus.UNAUTHORIZED,
                "Unauthorized: send the header 'Authorization: Bearer <token>' with "
                "this server's token.\n",
            )
            refusal.headers["WWW-Authenticate"] = "Bearer"
            return refusal
        if path == "/health":
            body = json.dumps(self._health()) + "\n"
            answer = connection.respond(http.HTTPStatus.OK, body)
            del answer.headers["Content-Type"]
            answer.headers["Content-Type"] = "application/json"
            return answer
        return None

    def _authorised(self, headers: Any) -> bool:
        if self.token is None:
            return True
        sent = headers.get_all("Authorization")
        scheme, _, token = sent[0].partition(" ") if len(sent) == 1 else ("", "", "")
        # In constant time: how long it takes does not tell how much of it was right.
        same = hmac.compare_digest(token.strip().encode(), self.token.encode())
        return same and scheme.lower() in ("bearer", "api-key")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
