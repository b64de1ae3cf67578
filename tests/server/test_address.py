"""Laws of where the service listens, and of what it tells a person about that."""

import contextlib
import logging
import socket
from typing import Any

import httpx2
import pytest

from server.__main__ import announce, url_of
from server.http.connection import listener
from tests.live import SMALL, live, process

needs_ipv6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this system has no IPv6")


def reaches(address: str, bound: socket.socket) -> bool:
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection((address, bound.getsockname()[1])):
        return True
    return False


@needs_ipv6
@pytest.mark.parametrize(
    ("host", "reached"),
    [
        ("127.0.0.1", {"127.0.0.1"}),
        ("0.0.0.0", {"127.0.0.1"}),
        ("localhost", {"127.0.0.1"}),
        ("::1", {"::1"}),
        ("::", {"127.0.0.1", "::1"}),
    ],
)
def test_every_address_of_ipv6_is_every_address(host: str, reached: set[str]) -> None:
    with contextlib.closing(listener(host, 0)) as bound:
        assert {address for address in ("127.0.0.1", "::1") if reaches(address, bound)} == reached


@needs_ipv6
def test_one_service_answers_both_families_by_each_of_their_names() -> None:
    with process("--host", "::", *SMALL) as service:
        service.wait_listening()
        port = service.url.rpartition(":")[2]
        for host in ("127.0.0.1", "[::1]", "localhost"):
            assert httpx2.get(f"http://{host}:{port}/version", trust_env=False).status_code == 200


@needs_ipv6
def test_a_service_on_ipv6_s_loopback_alone_knows_its_own_name_and_no_other() -> None:
    with process("--host", "::1", *SMALL) as service:
        service.url = service.url.replace("127.0.0.1", "[::1]")
        service.wait_listening()
        assert service.get("/version").status_code == 200
        assert service.get("/version", headers={"origin": service.url}).status_code == 200
        assert service.get("/version", headers={"host": "evil.example"}).status_code == 421


@pytest.mark.parametrize(
    ("host", "urls", "page"),
    [
        ("127.0.0.1", ["http://127.0.0.1:1/v1"], "http://127.0.0.1:1/"),
        ("llm.example", ["http://llm.example:1/v1"], "http://llm.example:1/"),
        ("::1", ["http://[::1]:1/v1"], "http://[::1]:1/"),
        ("0.0.0.0", ["http://0.0.0.0:1/v1", "http://127.0.0.1:1/v1"], "http://127.0.0.1:1/"),
        ("::", ["http://[::]:1/v1", "http://[::1]:1/v1"], "http://[::1]:1/"),
    ],
)
def test_a_person_is_told_urls_to_click(
    host: str, urls: list[str], page: str, caplog: pytest.LogCaptureFixture
) -> None:
    facts = announced(caplog, host=host)
    assert [facts["url"], *([facts["here"]] if "here" in facts else [])] == urls
    assert url_of(host, 1) == urls[0]
    assert facts["page"] == page


def test_a_service_without_a_page_tells_no_url_of_one(caplog: pytest.LogCaptureFixture) -> None:
    assert "page" not in announced(caplog, page=False)


def announced(caplog: pytest.LogCaptureFixture, **settings: Any) -> dict[str, Any]:
    caplog.set_level(logging.INFO, "microbatch")
    with live(log_format="json", **settings) as service:
        announce(service.model, 1)
    facts: dict[str, Any]
    [facts] = [record.facts for record in caplog.records if hasattr(record, "facts")]
    return facts
