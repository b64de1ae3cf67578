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
    *(file_route(f"/page/{file.name}", f"page/{file.name}") for file in sorted(HERE.glob("page/*.[cj]s*"))),
]
"""Where a person tries the model and watches the batcher. The files tell nothing secret, so they need no key."""
