"""Files for browsers, under a policy that lets a page load and ask nothing but this service."""

from functools import cache
from pathlib import Path

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
}


def file_route(path: str, name: str) -> Route:
    """The route of a file, which is named from this folder on."""

    async def file(request: Request) -> Response:
        return Response(content(name), headers=HEADERS, media_type=MEDIA_TYPES[Path(name).suffix])

    return Route(path, file)


@cache
def content(name: str) -> bytes:
    return (HERE / name).read_bytes()


PAGE = [
    file_route("/", "page/index.html"),
    *(file_route(f"/page/{file.name}", f"page/{file.name}") for file in sorted(HERE.glob("page/*.[cj]s*"))),
]
"""Where a person tries the model and watches the batcher. The files tell nothing secret, so they need no key."""
