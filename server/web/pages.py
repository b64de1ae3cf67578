"""Files for browsers, under a content security policy that restricts pages to this service.

Browsers revalidate each time and get a 304 for an unchanged file, so that a new version shows at once.
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
    """A file's bytes, plain and compressed, and the ETag of both."""

    plain: bytes
    compressed: bytes
    tag: str


def file_route(path: str, name: str) -> Route:
    """The route of a file, named relative to this folder."""

    async def file(request: Request) -> Response:
        return response(request, await to_thread.run_sync(asset, name), MEDIA_TYPES[Path(name).suffix])

    return Route(path, file)


def files_in(folder: str) -> list[str]:
    """The files for browsers in a folder and below it, named relative to this folder."""
    file_asset = [file for file in HERE.joinpath(folder).rglob("*") if file.suffix in MEDIA_TYPES]
    return sorted(file.relative_to(HERE).as_posix() for file in file_asset)


@cache
def asset(name: str, without: bytes = b"") -> Asset:
    """A file without one part of it. Read and compressed once, off the event loop, which a megabyte would block."""
    plain = (HERE / name).read_bytes().replace(without, b"")
    return Asset(plain, gzip.compress(plain, mtime=0), f'W/"{sha256(plain).hexdigest()[:32]}"')


def response(request: Request, file_asset: Asset, media_type: str) -> Response:
    """The file, or a 304 if the client's copy is current."""
    headers = HEADERS | {"etag": file_asset.tag}
    if file_asset.tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(file_asset.compressed, headers=headers | {"content-encoding": "gzip"}, media_type=media_type)
    return Response(file_asset.plain, headers=headers, media_type=media_type)


PAGE = [
    file_route("/", "page/index.html"),
    *(file_route(f"/{name}", name) for name in files_in("page") if not name.endswith(".html")),
]
"""The page for trying the model and watching the batcher. Its files hold nothing secret, so they need no key."""


LINK = b'<a href="./">Chat and live view</a>\n'


async def docs(request: Request) -> Response:
    """`GET /docs`, without the link to the page at `/` if that is off."""
    service: Service = request.app.state.service
    file_asset = await to_thread.run_sync(asset, "docs.html", b"" if service.settings.page else LINK)
    return response(request, file_asset, "text/html")


async def openapi(request: Request) -> Response:
    """`GET /openapi.json`."""
    service: Service = request.app.state.service
    keyed = any(layer.cls is ApiKey for layer in request.app.user_middleware)
    document = await to_thread.run_sync(_encoded, service.settings.served_names[0], keyed)
    return Response(document, media_type="application/json")


def _encoded(model: str, keyed: bool) -> bytes:
    from server.web.openapi import encoded  # late, because it builds schemas that nothing else needs

    return encoded(model, keyed)


ROUTES = [
    Route("/openapi.json", openapi),
    Route("/docs", docs),
    file_route("/docs.css", "docs.css"),
    file_route("/docs.js", "docs.js"),
    file_route("/docs/swagger-ui.css", "swagger/swagger-ui.css"),
    file_route("/docs/swagger-ui-bundle.js", "swagger/swagger-ui-bundle.js"),
]
"""They hold nothing secret, so they need no key."""
