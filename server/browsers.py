"""Keeps web pages from elsewhere out: a browser on the same machine or network carries their requests here.

A page can be given a name that resolves to this machine (DNS rebinding), so `Host` is checked; and a browser says in
`Origin` whose page sends a request, which forms and scripts can do without asking (CSRF).
"""

from collections.abc import Awaitable, Callable, Collection
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError

LOOPBACK = frozenset(["localhost", "127.0.0.1", "[::1]"])
EXEMPT = frozenset(["/health", "/health/live", "/health/ready", "/metrics"])
"""Probes and scrapers name this machine as they like, and a page can learn nothing there that matters."""


def allowed_hosts(host: str, asked: Collection[str]) -> frozenset[str]:
    """The names that requests may be addressed to, or `*`: by default any, or those of loopback if bound to that."""
    if asked:
        return LOOPBACK | {name.lower() for name in asked}
    return LOOPBACK | {host.lower()} if is_loopback(host) else frozenset(["*"])


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class BrowserGuard:
    """Refuses requests addressed to an unknown host, and those that pages of unknown origins send.

    `origins` are those that may, `*` for all; a page of this service's own always may. `refuse` answers without.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: frozenset[str],
        origins: Collection[str],
        refuse: Callable[[Request, ApiError], Awaitable[Response]],
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._origins = origins
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in EXEMPT and (error := self._fault(Headers(scope=scope))):
            response = await self._refuse(Request(scope), error)
            return await response(scope, receive, send)
        await self._app(scope, receive, send)

    def _fault(self, headers: Headers) -> ApiError | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if host and not self._knows(host):
            message = "Requests to this host name are not answered here; the operator can add it to --allowed-hosts."
            return ApiError(421, message, code="unknown_host")
        if origin is not None and not self._may(origin, host):
            message = "Pages of this origin may not call here; the operator can add it to --cors-origins."
            return ApiError(403, message, code="unknown_origin")
        return None

    def _knows(self, host: str) -> bool:
        name = host.lower()
        if not name.endswith("]"):
            name = name.rsplit(":", 1)[0] if ":" in name else name
        return "*" in self._hosts or name in self._hosts

    def _may(self, origin: str, host: str) -> bool:
        return "*" in self._origins or origin in self._origins or origin.partition("://")[2].lower() == host.lower()
