"""`GET /docs`: a page for people, drawn in the browser from /openapi.json. It loads nothing from elsewhere."""

from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from server.openapi import openapi

MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


async def page(request: Request) -> Response:
    """The page, its style or its script."""
    name = request.url.path.rpartition("/")[2]
    file = Path(name if "." in name else f"{name}.html")
    return Response(content(file.name), headers=HEADERS, media_type=MEDIA_TYPES[file.suffix])


@cache
def content(name: str) -> bytes:
    """A file beside this one."""
    return Path(__file__).with_name(name).read_bytes()


ROUTES = [Route("/openapi.json", openapi), *(Route(path, page) for path in ("/docs", "/docs.css", "/docs.js"))]
"""They tell nothing secret, so they need no key."""
