"""Laws of files for browsers: sent once, compressed where that is understood, and sent again only when they changed."""

import gzip
from collections.abc import Iterator

import httpx2
import pytest

from server.web.pages import PAGE
from server.web.pages import ROUTES as DOCS
from tests.live import Live, live

PATHS = [route.path for route in [*PAGE, *DOCS] if route.path != "/openapi.json"]


@pytest.fixture(scope="module")
def service() -> Iterator[Live]:
    with live() as found:
        yield found


def raw(service: Live, path: str, **headers: str) -> tuple[httpx2.Response, bytes]:
    """The answer, and its body as it came."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    with httpx2.stream("GET", service.url + path, headers={"accept-encoding": "identity"} | named) as answer:
        return answer, b"".join(answer.iter_raw())


@pytest.mark.parametrize("path", PATHS)
def test_a_file_is_the_same_compressed_and_not(service: Live, path: str) -> None:
    plain, whole = raw(service, path)
    packed, compressed = raw(service, path, accept_encoding="br, gzip")
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(compressed) == whole
    assert plain.headers["vary"] == packed.headers["vary"] == "accept-encoding"
    assert plain.headers["etag"] == packed.headers["etag"]


@pytest.mark.parametrize("path", PATHS)
def test_a_file_that_the_client_has_is_not_sent_again(service: Live, path: str) -> None:
    first, _ = raw(service, path)
    again, body = raw(service, path, if_none_match=first.headers["etag"])
    assert (again.status_code, body) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert again.headers["content-security-policy"] == first.headers["content-security-policy"]
    assert raw(service, path, if_none_match='W/"another"')[0].status_code == 200


def test_files_that_differ_have_different_tags(service: Live) -> None:
    assert len({service.get(path).headers["etag"] for path in PATHS}) == len(PATHS)
    with live(page=False) as other:
        assert other.get("/docs").headers["etag"] != service.get("/docs").headers["etag"]
