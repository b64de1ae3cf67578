"""The balancer's file with a real HAProxy in front of scripted servers, each of which says who it is."""

import contextlib
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.balancer import CONFIGURATION, balancing, configuration
from server.settings import parse
from tests.deploy.prometheus import found
from tests.live import Address, Live, eventually, live, scripted

NAMES = ("one", "two", "three")
texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=200)
names = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1)
contents = texts | texts.map(lambda text: [{"type": "text", "text": text}])


def seconds(name: str) -> float:
    """A timeout of the file."""
    [line] = [line for line in CONFIGURATION.read_text().splitlines() if line.split()[:2] == ["timeout", name]]
    return float(line.split()[2].removesuffix("s"))


def test_the_file_waits_longer_than_the_service_and_keeps_connections_shorter() -> None:
    defaults = parse([])
    assert seconds("server") > defaults.request_timeout_s
    assert seconds("client") > defaults.request_timeout_s
    assert seconds("http-keep-alive") < defaults.keep_alive_s


def test_servers_that_are_started_as_the_guide_says_answer_to_the_name_that_clients_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guide = (CONFIGURATION.parent / "README.md").read_text()
    for variable, value in re.findall(r"\b(MICROBATCH_\w+)='?([^'\s]+)'?", guide.partition("Clients use port")[0]):
        monkeypatch.setenv(variable, value)
    with live(allowed_hosts=parse([]).allowed_hosts) as server:
        assert server.get("/v1/models", headers={"host": "gpus.example.com:21010"}).status_code == 200


def test_without_affinity_no_rule_of_a_hash_is_left() -> None:
    servers = [urlsplit("http://127.0.0.1:1"), urlsplit("http://127.0.0.1:2")]
    with_it, without = (configuration(80, servers, affinity=affinity) for affinity in (True, False))
    assert "balance hash" in with_it
    assert "hash-" not in without
    assert without.count("balance ") == 1


@contextlib.contextmanager
def balanced(folder: Path, *servers: Live) -> Iterator[Address]:
    """HAProxy in front of them, once it answers."""
    found("haproxy")
    with balancing([urlsplit(server.url) for server in servers], folder) as url:
        address = Address(url.geturl())
        eventually(lambda: answers(address), "HAProxy answers")
        yield address


def answers(address: Address) -> bool:
    try:
        return address.get("/health/ready").status_code == 200
    except httpx2.TransportError:
        return False


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(live(scripted(name, context_window=100_000))) for name in NAMES]
        yield stack.enter_context(balanced(tmp_path_factory.mktemp("haproxy"), *servers))


def asked(client: httpx2.Client, messages: list[Any], **fields: Any) -> str:
    """Which server answers. With one connection, requests come one after the other."""
    headers = fields.pop("headers", None)
    body = orjson.dumps({"messages": messages} | fields)
    answer = client.post("/v1/chat/completions", content=body, headers=headers).raise_for_status()
    name: str = answer.json()["choices"][0]["message"]["content"]
    return name


def conversation(system: str | None, said: list[str]) -> Iterator[list[Any]]:
    """The messages of each of its turns."""
    messages: list[Any] = [{"role": "system", "content": system}] if system else []
    for text in said:
        messages = [*messages, {"role": "user", "content": text}]
        yield messages
        messages = [*messages, {"role": "assistant", "content": f"answer to {text}"}]


@pytest.mark.deploy
@settings(max_examples=25, deadline=None)
@given(system=st.none() | texts, said=st.lists(texts, min_size=2, max_size=4))
def test_all_turns_of_a_conversation_go_to_one_server(three: Address, system: str | None, said: list[str]) -> None:
    with three.http() as client:
        assert len({asked(client, messages) for messages in conversation(system, said)}) == 1


@pytest.mark.deploy
@settings(max_examples=25, deadline=None)
@given(
    name=st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1), said=st.lists(contents, min_size=2)
)
def test_requests_with_one_name_go_to_one_server_whatever_they_say(three: Address, name: str, said: list[Any]) -> None:
    with three.http() as client:
        user = [[{"role": "user", "content": content}] for content in said]
        assert len({asked(client, messages, headers={"x-session-id": name}) for messages in user}) == 1
        assert len({asked(client, messages, prompt_cache_key=name) for messages in user}) == 1


@pytest.mark.deploy
def test_conversations_with_one_system_prompt_are_spread(three: Address) -> None:
    with three.http() as client:
        for system in ("Be brief.", "Be brief. " * 5000):
            turns = [next(conversation(system, [f"question {number}"])) for number in range(40)]
            assert {asked(client, messages) for messages in turns} == set(NAMES)


@pytest.mark.deploy
def test_a_body_that_is_longer_than_the_buffer_arrives_whole(three: Address) -> None:
    with three.http() as client:
        answer = client.post("/v1/tokenize", content=orjson.dumps({"prompt": "a" * 1_000_000}))
    assert answer.json()["count"] == 1_000_000


@pytest.mark.deploy
@pytest.mark.parametrize("path", ["/metrics", "/metrics?all", "/%6Detrics", "http://localhost/metric%73"])
def test_metrics_are_not_behind_the_balancer_however_they_are_spelled(path: str, three: Address) -> None:
    with three.connect() as bare:
        bare.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert bare.recv(1024).startswith(b"HTTP/1.1 404 ")


@pytest.mark.deploy
def test_one_name_for_all_requests_cannot_overload_one_server(tmp_path: Path) -> None:
    engines = [scripted(name, stepped=True) for name in NAMES[:2]]
    with (
        live(engines[0]) as one,
        live(engines[1]) as two,
        balanced(tmp_path, one, two) as both,
        ThreadPoolExecutor(16) as pool,
    ):
        sent = [pool.submit(both.chat, headers={"x-session-id": "all"}) for _ in range(16)]
        eventually(lambda: rows(one) + rows(two) == 16, "all have been handed over")
        # Of 16, one may have a quarter more than 8.
        assert min(rows(one), rows(two)) >= 6
        for engine in engines:
            engine.release(1000)
        assert [answer.result().status_code for answer in sent] == [200] * 16


def rows(server: Live) -> int:
    """How many requests were accepted there."""
    return int(server.sample("microbatch_queue_depth") + server.sample("microbatch_running_rows"))


@pytest.mark.deploy
def test_a_client_that_leaves_takes_its_request_along(tmp_path: Path) -> None:
    engine = scripted("a long answer", stepped=True)
    with live(engine) as server, balanced(tmp_path, server) as front:
        with front.connect() as client:
            body = orjson.dumps({"messages": [{"role": "user", "content": "Hi"}]})
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            server.wait_running()
        engine.release(1)
        [ended] = server.wait_ended()
        assert ended.outcome.name == "CANCELLED"


@pytest.mark.deploy
def test_without_one_server_the_other_one_answers_all(tmp_path: Path) -> None:
    with live(scripted("one")) as one, live(scripted("two")) as two:
        pass
    with live(scripted("one")) as one, balanced(tmp_path, one, two) as both, both.http() as client:
        turns = [next(conversation(None, [f"question {number}"])) for number in range(20)]
        assert {asked(client, messages) for messages in turns} == {"one"}


@pytest.mark.deploy
def test_the_file_is_valid_as_it_stands() -> None:
    subprocess.run([found("haproxy"), "-c", "-f", str(CONFIGURATION)], check=True, capture_output=True)
