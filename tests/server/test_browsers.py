"""Laws of what a web page from elsewhere can do here: nothing."""

import orjson
import pytest

from server.http.middleware import allowed_hosts
from tests.live import QUESTION, Live, live
from tests.server.test_app import error_of

BODY = orjson.dumps({"messages": QUESTION})
JSON = {"content-type": "application/json"}
EVIL = "http://evil.example"


def port_of(service: Live) -> str:
    return service.url.rsplit(":", 1)[1]


@pytest.mark.parametrize("path", ["/v1/models", "/internal/state", "/internal/live", "/version", "/", "/docs"])
def test_a_name_that_resolves_here_is_not_enough(path: str) -> None:
    with live(allowed_hosts=()) as service:
        for host in ("evil.example", f"evil.example:{port_of(service)}", "127.0.0.1.evil.example", "localhost.evil:80"):
            error_of(service.get(path, headers={"host": host}), 421, "unknown_host")
        error_of(service.post(BODY, headers=JSON | {"host": "evil.example"}), 421, "unknown_host")
        assert not service.engine.batches


def test_loopback_is_known_by_each_of_its_names() -> None:
    with live(allowed_hosts=()) as service:
        for host in ("localhost", "LOCALHOST:1", f"127.0.0.1:{port_of(service)}", "[::1]", "[::1]:21010"):
            assert service.get("/v1/models", headers={"host": host}).status_code == 200


def test_probes_and_scrapers_may_name_the_machine_as_they_like() -> None:
    with live(allowed_hosts=()) as service:
        for path in ("/health", "/health/live", "/health/ready", "/metrics"):
            assert service.get(path, headers={"host": "pod-7.cluster"}).status_code == 200


@pytest.mark.parametrize(
    ("bound", "asked", "host", "known"),
    [
        ("127.0.0.1", (), "localhost", True),
        ("127.0.0.2", (), "127.0.0.2", True),
        ("::1", (), "[::1]", True),
        ("localhost", (), "evil.example", False),
        ("0.0.0.0", (), "any.example", True),
        ("::", (), "any.example", True),
        ("192.0.2.7", (), "any.example", True),
        ("0.0.0.0", ("llm.example",), "LLM.example".lower(), True),
        ("0.0.0.0", ("llm.example",), "evil.example", False),
        ("127.0.0.1", ("*",), "evil.example", True),
    ],
)
def test_which_hosts_are_known_depends_on_what_is_bound(
    bound: str, asked: tuple[str, ...], host: str, known: bool
) -> None:
    hosts = allowed_hosts(bound, asked)
    assert (host in hosts or "*" in hosts) is known


@pytest.mark.parametrize(
    ("asked", "host"),
    [
        ("llm.example:8443", "llm.example:8443"),
        ("LLM.example:8443", "llm.example"),
        ("2001:db8::1", "[2001:db8::1]:21010"),
        ("[2001:db8::1]:21010", "[2001:db8::1]"),
    ],
)
def test_an_allowed_host_may_be_written_as_clients_send_it(asked: str, host: str) -> None:
    with live(allowed_hosts=(asked,)) as service:
        assert service.get("/v1/models", headers={"host": host}).status_code == 200
        for other in ("evil.example:8443", "[2001:db8::2]:21010"):
            error_of(service.get("/v1/models", headers={"host": other}), 421, "unknown_host")


@pytest.mark.parametrize("origin", [EVIL, "null", "http://127.0.0.1:1", "http://localhost", ""])
def test_a_page_of_another_origin_can_neither_ask_nor_read(origin: str) -> None:
    with live() as service:
        error_of(service.post(BODY, headers=JSON | {"origin": origin}), 403, "unknown_origin")
        error_of(service.get("/internal/state", headers={"origin": origin}), 403, "unknown_origin")
        assert not service.engine.batches


def test_the_service_s_own_page_and_allowed_origins_may_ask() -> None:
    with live(cors_origins=("http://app.example",)) as service:
        for origin in (service.url, "http://app.example"):
            assert service.post(BODY, headers=JSON | {"origin": origin}).status_code == 200
        answer = service.post(BODY, headers=JSON | {"origin": "http://app.example"})
        assert answer.headers["access-control-allow-origin"] == "http://app.example"
        error_of(service.post(BODY, headers=JSON | {"origin": EVIL}), 403, "unknown_origin")
    with live(cors_origins=("*",)) as service:
        assert service.post(BODY, headers=JSON | {"origin": EVIL}).status_code == 200


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        ("https://llm.example", "llm.example:443", 200),
        ("http://llm.example", "LLM.example:80", 200),
        ("https://llm.example:8443", "llm.example:8443", 200),
        ("https://llm.example", "llm.example:80", 403),
        ("https://llm.example:8443", "llm.example:443", 403),
        ("https://evil.example", "llm.example:443", 403),
    ],
)
def test_a_proxy_may_add_the_port_that_a_browser_leaves_out(origin: str, host: str, status: int) -> None:
    with live(allowed_hosts=("llm.example",)) as service:
        assert service.post(BODY, headers=JSON | {"origin": origin, "host": host}).status_code == status


def test_an_allowed_origin_may_end_with_a_slash() -> None:
    with live(cors_origins=("http://app.example/",)) as service:
        answer = service.post(BODY, headers=JSON | {"origin": "http://app.example"})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "http://app.example"


@pytest.mark.parametrize(
    "kind", ["text/plain", "text/plain;charset=UTF-8", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_a_form_s_body_is_refused_in_words(kind: str) -> None:
    with live() as service:
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"):
            error = error_of(service.post(BODY, path, headers={"content-type": kind}), 415, "unsupported_content_type")
            assert "content-type: application/json" in error["message"]
        assert not service.engine.batches


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "application/vnd.api+json"])
def test_json_by_any_of_its_names_is_read(kind: str) -> None:
    with live() as service:
        assert service.post(BODY, headers={"content-type": kind}).status_code == 200
        assert service.post(BODY).status_code == 200
