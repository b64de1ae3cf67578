"""`GET /docs`: a page for people, drawn in the browser from /openapi.json. It loads nothing from elsewhere."""

from starlette.routing import Route

from server.openapi import openapi
from server.static import file_route

ROUTES = [
    Route("/openapi.json", openapi),
    file_route("/docs", "docs.html"),
    file_route("/docs.css", "docs.css"),
    file_route("/docs.js", "docs.js"),
]
"""They tell nothing secret, so they need no key."""
