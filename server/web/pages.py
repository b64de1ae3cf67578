"""Files for browsers, under a policy that lets a page load and ask nothing but this service.

A browser asks again each time and gets a 304 for what it has, so that a new version is seen at once.
"""

import gzip
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from server.http.middleware import ApiKey
from server.service import Service

HERE = Path(__file__).parent
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
    "vary": "accept-encoding",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """A file's bytes, the same compressed, and the tag that names both to caches."""

    plain: bytes
    compressed: bytes
    tag: str


def file_route(path: str, name: str) -> Route:
    """The route of a file, which is named from this folder on."""

    async def file(request: Request) -> Response:
        return response(request, await to_thread.run_sync(asset, name), MEDIA_TYPES[Path(name).suffix])

    return Route(path, file)


def files_in(folder: str) -> list[str]:
    """The files for browsers in a folder and those below it, named from here on."""
    found = [file for file in HERE.joinpath(folder).rglob("*") if file.suffix in MEDIA_TYPES]
    return sorted(file.relative_to(HERE).as_posix() for file in found)


@cache
def asset(name: str, without: bytes = b"") -> Asset:
    """A file, less a part of it. Read and compressed once: not on the event loop, which a megabyte would hold up."""
    plain = (HERE / name).read_bytes().replace(without, b"")
    return Asset(plain, gzip.compress(plain, mtime=0), f'W/"{sha256(plain).hexdigest()[:32]}"')


def response(request: Request, found: Asset, media_type: str) -> Response:
    """The file, or that the client's copy is still good."""
    headers = HEADERS | {"etag": found.tag}
    if found.tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(found.compressed, headers=headers | {"content-encoding": "gzip"}, media_type=media_type)
    return Response(found.plain, headers=headers, media_type=media_type)


PAGE = [
    file_route("/", "page/index.html"),
    *(file_route(f"/{name}", name) for name in files_in("page") if not name.endswith(".html")),
]
"""Where a person tries the model and watches the batcher. The files tell nothing secret, so they need no key."""


LINK = b'<a href="./">Chat and live view</a>\n'


async def docs(request: Request) -> Response:
    """`GET /docs`, without the link to the page at `/` where that is off."""
    service: Service = request.app.state.service
    found = await to_thread.run_sync(asset, "docs.html", b"" if service.settings.page else LINK)
    return response(request, found, "text/html")


async def openapi(request: Request) -> Response:
    """`GET /openapi.json`: what the service serves."""
    service: Service = request.app.state.service
    keyed = any(layer.cls is ApiKey for layer in request.app.user_middleware)
    document = await to_thread.run_sync(_encoded, service.settings.served_names[0], keyed)
    return Response(document, media_type="application/json")


def _encoded(model: str, keyed: bool) -> bytes:
    from server.web.openapi import encoded  # with the types of all answers, which nothing else needs

    return encoded(model, keyed)


ROUTES = [
    Route("/openapi.json", openapi),
    Route("/docs", docs),
    file_route("/docs.css", "docs.css"),
    file_route("/docs.js", "docs.js"),
    file_route("/docs/swagger-ui.css", "swagger/swagger-ui.css"),
    file_route("/docs/swagger-ui-bundle.js", "swagger/swagger-ui-bundle.js"),
]
"""They tell nothing secret, so they need no key."""
