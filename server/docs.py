"""`GET /docs`: Swagger UI on /openapi.json, from files in `swagger/`. It loads nothing from elsewhere."""

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from server.middleware import ApiKey
from server.service import Service
from server.static import asset, file_route, response

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
    from server.openapi import encoded  # with the types of all answers, which nothing else needs

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
