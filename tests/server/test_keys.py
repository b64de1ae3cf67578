"""Laws of API keys: how they are read, whom they let in, and how those who hold them share the device."""

import functools
import select
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx2
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

import server.service
from batching.types import Request
from server.callers import Key, KeyFileError, load_keys
from server.http.middleware import key_of
from server.settings import parse
from tests.live import QUESTION, Live, eventually, live, raw_request, scripted
from tests.server.test_app import error_of, remembering

SECRET = "sk-do-not-tell"
FILE = f"""
# the team's keys

alice  {SECRET}-a
bob\t{SECRET}-b\t3
   carol {SECRET}-c 0.5
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(FILE)
    return path


@pytest.fixture(scope="module")
def guarded() -> Iterator[Live]:
    with live(api_keys=(SECRET,)) as service:
        yield service


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as executor:
        yield executor


def ask(service: Live, who: str, name: str | None = None, **fields: Any) -> httpx2.Response:
    headers = {"authorization": f"Bearer {SECRET}-{who}"} | ({"x-request-id": name} if name else {})
    return service.chat(headers=headers, **fields)


# The file


def test_a_file_has_a_name_a_key_and_perhaps_a_share_on_a_line(file: Path) -> None:
    keys = load_keys((), file)
    found = [key_of(keys, f"{SECRET}-{who}".encode()) for who in "abcd"]
    assert [(key.name, key.share) if key else None for key in found] == [
        ("alice", 1.0),
        ("bob", 3.0),
        ("carol", 0.5),
        None,
    ]


def test_a_file_may_begin_with_a_byte_order_mark_and_have_the_line_ends_of_windows(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbfalice one\r\nbob two\r\n")
    assert [key.name for key in load_keys((), file)] == ["alice", "bob"]
    file.write_bytes(b"\xef\xbb\xbf# ours\r\nbob two\r\n")
    assert [key.name for key in load_keys((), file)] == ["bob"]


def test_keys_of_the_settings_and_of_the_file_are_all_good(file: Path) -> None:
    keys = load_keys(("one", "zwei-é"), file)
    found = [key_of(keys, secret.encode()) for secret in ("one", "zwei-é", f"{SECRET}-b", "three", "")]
    assert [key.name if key else None for key in found] == ["key-1", "key-2", "bob", None, None]
    assert not load_keys((), None)


def test_only_digests_are_kept(file: Path) -> None:
    keys = load_keys((SECRET,), file)
    assert SECRET not in repr(keys)
    key = key_of(keys, SECRET.encode())
    assert key is not None
    assert key.digest == sha256(SECRET.encode()).digest()
    assert SECRET not in repr(key)


@given(st.lists(st.binary(min_size=1), unique=True, min_size=1, max_size=5), st.binary())
def test_a_key_is_found_by_its_own_secret_and_no_other(secrets: list[bytes], guess: bytes) -> None:
    keys = [Key(str(n), sha256(secret).digest()) for n, secret in enumerate(secrets)]
    for n, secret in enumerate(secrets):
        found = key_of(keys, secret)
        assert found is not None
        assert found.name == str(n)
    assert (key_of(keys, guess) is not None) is (guess in secrets)


@pytest.mark.parametrize(
    "line",
    [
        SECRET,
        f"name {SECRET} share",
        f"name {SECRET} 0",
        f"name {SECRET} -1",
        f"name {SECRET} 1001",
        f"name {SECRET} nan",
        f"name {SECRET} inf",
        f"name {SECRET} 1 more",
        f"name {SECRET} # a comment",
        f"name two words {SECRET}",
    ],
)
def test_a_line_that_is_wrong_is_told_by_its_number_and_without_its_key(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# one\ngood key-of-good\n{line}\n")
    with pytest.raises(KeyFileError) as caught:
        load_keys((), path)
    with pytest.raises(SystemExit):
        parse(["--api-keys-file", str(path)])
    told = capsys.readouterr().err
    for text in (str(caught.value), told):
        assert "line 3 of" in text
        assert "\n" not in text.strip()
        assert SECRET not in text
        assert "key-of-good" not in text
    assert told.startswith("microbatch: ")


@pytest.mark.parametrize("content", [None, b"", b"\n  \n", b"# nobody yet\n", b"name \xff\xfe"])
def test_a_file_without_a_key_is_refused_rather_than_let_everyone_in(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(KeyFileError):
        load_keys(("another",), path)
    with pytest.raises(SystemExit):
        parse(["--api-keys-file", str(path)])
    assert str(path) in capsys.readouterr().err


# Who may ask


def test_without_a_key_of_the_file_nothing_is_answered(file: Path) -> None:
    with live(api_keys_file=file) as service:
        for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/detokenize", "/nothing"):
            for headers in ({}, {"authorization": f"Bearer {SECRET}"}, {"authorization": "Bearer alice"}):
                refused = service.post(b"{}", path, headers=headers)
                error_of(refused, 401, "unknown_api_key")
                assert SECRET not in refused.text
                assert "alice" not in refused.text
        assert not service.engine.batches
        assert ask(service, "a").status_code == ask(service, "b").status_code == 200


@pytest.mark.parametrize("host", ["localhost", "localhost/health/live", "localhost/metrics?", "localhost#/docs"])
@pytest.mark.parametrize(
    "target",
    [
        "/v1/models",
        "//v1/models",
        "/health/live/../../v1/models",
        "/metrics/..%2fv1/models",
        "/%761/models",
        "/v1/models?/health/live",
        "http://localhost/v1/models",
        "http://localhost/metrics/../v1/models",
    ],
)
def test_no_way_of_writing_an_address_goes_without_a_key(target: str, host: str, guarded: Live) -> None:
    with guarded.connect() as bare:
        bare.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        assert bare.recv(12) == b"HTTP/1.1 401"


def test_a_row_carries_its_key_s_name_and_share(file: Path) -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen)), api_keys_file=file, api_keys=(f"{SECRET}-x",)) as service:
        asked: list[tuple[str, dict[str, Any]]] = [("a", {}), ("b", {}), ("b", {"priority": -1})]
        for who, fields in [*asked, ("c", {"priority": 2}), ("x", {"n": 2})]:
            assert ask(service, who, **fields).status_code == 200
    assert [(request.client, request.weight, request.priority) for request in seen] == [
        ("alice", 1.0, 0),
        ("bob", 3.0, 0),
        ("bob", 3.0, -1),
        ("carol", 0.5, 2),
        ("key-1", 1.0, 0),
        ("key-1", 1.0, 0),
    ]


@pytest.mark.parametrize(("sharing", "salts"), [("key", {"alice", "bob"}), ("all", {""})])
def test_keys_share_prefixes_only_if_a_setting_says_so(sharing: str, salts: set[str], file: Path) -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen)), api_keys_file=file, prefix_sharing=sharing) as service:
        for who in "ab":
            assert ask(service, who).status_code == 200
    assert len(seen) == 2
    assert {request.salt for request in seen} == salts


def test_a_row_of_nobody_s_has_no_name() -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen))) as service:
        ask(service, "a")
    assert [(request.client, request.weight) for request in seen] == [("", 1.0)]


def test_metrics_never_tell_who_holds_keys(file: Path) -> None:
    with live(api_keys_file=file) as service:
        for who in "abcz":
            ask(service, who)
        scraped = service.get("/metrics").text
    assert not any(secret in scraped for secret in ("alice", "bob", "carol", SECRET))


# How they share


def flood(
    service: Live, pool: ThreadPoolExecutor, *names: str, already: int = 0, **fields: Any
) -> list[Future[httpx2.Response]]:
    """Requests named after their key's holder and a number, each there before the next one comes."""
    answers = []
    for place, name in enumerate(names, already + 1):
        answers.append(pool.submit(ask, service, name[0], name, **fields))
        service.wait_queued(place)
    return answers


@pytest.mark.parametrize(("rival", "of_rival"), [("c", 2), ("b", 9)])
def test_keys_that_flood_the_service_are_served_by_share(
    rival: str, of_rival: int, pool: ThreadPoolExecutor, file: Path
) -> None:
    """Shares of 1 and 0.5, and of 1 and 3: of the first rows that both wait for, each has its part."""
    with live(scripted("ok", stepped=True), api_keys_file=file, max_batch_size=1) as service:
        running = pool.submit(ask, service, "a", "first")
        service.wait_running()
        mine = [f"a{n}" for n in range(10)]
        theirs = [f"{rival}{n}" for n in range(10)]
        answers = flood(service, pool, *mine, *theirs)
        service.engine.release(10_000)
        assert all(answer.result().status_code == 200 for answer in [running, *answers])
        order = [batch[0] for batch in service.engine.batches][1:]
    # Shares of 2 : 1 show in the first 6 rows, those of 1 : 3 in the first 12.
    first = order[: {"c": 6, "b": 12}[rival]]
    assert abs(sum(name.startswith(rival) for name in first) - of_rival) <= 1
    assert [name for name in order if name.startswith("a")] == mine
    assert [name for name in order if name.startswith(rival)] == theirs


def test_one_key_s_flood_does_not_delay_another_key_s_single_request(pool: ThreadPoolExecutor, file: Path) -> None:
    with live(scripted("ok", stepped=True), api_keys_file=file, max_batch_size=1) as service:
        running = pool.submit(ask, service, "a", "first")
        service.wait_running()
        answers = flood(service, pool, *(f"a{n}" for n in range(12)), "b-alone")
        service.engine.release(10_000)
        assert all(answer.result().status_code == 200 for answer in [running, *answers])
        order = [batch[0] for batch in service.engine.batches]
    assert order.index("b-alone") <= 2


def test_a_key_s_limit_of_waiting_requests_is_its_own(pool: ThreadPoolExecutor, file: Path) -> None:
    with live(scripted("ok", stepped=True), api_keys_file=file, max_batch_size=1, key_queue_size=2) as service:
        running = pool.submit(ask, service, "a", "first")
        service.wait_running()
        answers = flood(service, pool, "a1", "a2")
        for stream in (False, True):
            refused = ask(service, "a", stream=stream)
            error_of(refused, 429, "queue_full")
            assert 1 <= int(refused.headers["retry-after"]) <= 60
        answers += flood(service, pool, "b1", already=2)
        error_of(ask(service, "b", n=2), 429, "queue_full")
        answers += flood(service, pool, "b2", already=3)
        service.engine.release(10_000)
        assert all(answer.result().status_code == 200 for answer in [running, *answers])
        assert ask(service, "a").status_code == 200


def test_a_refusal_of_a_full_queue_is_not_tokenized(
    pool: ThreadPoolExecutor, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with live(scripted("ok", stepped=True), api_keys_file=file, max_batch_size=1, key_queue_size=1) as service:
        running = pool.submit(ask, service, "a", "first")
        service.wait_running()
        answers = flood(service, pool, "a1")
        encoded = Mock(wraps=service.model.text.encode)
        monkeypatch.setattr(service.model.text, "encode", encoded)
        for stream in (False, True):
            error_of(ask(service, "a", stream=stream), 429, "queue_full")
        assert not encoded.called
        assert service.sample("microbatch_rejected_requests_total", reason="queue_full") == 2
        service.engine.release(10_000)
        assert all(answer.result().status_code == 200 for answer in [running, *answers])


def test_refusals_of_a_key_that_floods_wait_and_another_s_do_not(
    pool: ThreadPoolExecutor, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.service, "REFUSALS_AT_ONCE", 1)
    monkeypatch.setattr(server.service, "REFUSALS_A_SECOND", 1e-6)
    monkeypatch.setattr(server.service, "REFUSAL_SECONDS", 1e6)
    with live(scripted("ok", stepped=True), api_keys_file=file, max_batch_size=1, key_queue_size=1) as service:
        running = pool.submit(ask, service, "a", "first")
        service.wait_running()
        answers = flood(service, pool, "a1", "b1")
        error_of(ask(service, "a"), 429, "queue_full")
        with service.connect() as waiting:
            waiting.sendall(raw_request(orjson.dumps({"messages": QUESTION}), f"Authorization: Bearer {SECRET}-a"))
            eventually(
                lambda: service.sample("microbatch_rejected_requests_total", reason="queue_full") == 2, "it is refused"
            )
            error_of(ask(service, "b"), 429, "queue_full")
            assert select.select([waiting], [], [], 0)[0] == []
        service.engine.release(10_000)
        assert all(answer.result().status_code == 200 for answer in [running, *answers])


def test_a_key_s_limit_of_waiting_tokens_is_its_own(pool: ThreadPoolExecutor, file: Path) -> None:
    with live(scripted("ok", stepped=True), api_keys_file=file, max_batch_size=1, key_queue_tokens=150) as service:
        running = pool.submit(ask, service, "a", "first", max_tokens=10)
        service.wait_running()
        answers = flood(service, pool, "a1", max_tokens=100)  # and a prompt of 20
        error_of(ask(service, "a", max_tokens=100), 429, "queue_full")
        answers += flood(service, pool, "b1", already=1, max_tokens=100)
        answers += flood(service, pool, "a2", already=2, max_tokens=10)
        service.engine.release(10_000)
        assert all(answer.result().status_code == 200 for answer in [running, *answers])


def test_what_no_empty_queue_would_hold_is_not_told_to_come_back(file: Path) -> None:
    limits: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"queue_size": 2}, {"n": 3}),
        ({"key_queue_size": 2}, {"n": 3}),
        ({"key_queue_tokens": 100}, {"max_tokens": 100}),
    ]
    for settings, fields in limits:
        with live(api_keys_file=file, **settings) as service:
            error_of(ask(service, "a", **fields), 400, "too_large")
            assert not service.engine.batches
            assert ask(service, "a", max_tokens=10).status_code == 200


def test_one_key_that_fills_the_queue_leaves_places_for_another(file: Path) -> None:
    with (
        live(scripted(stepped=True), api_keys_file=file, queue_size=8, max_batch_size=1) as service,
        ThreadPoolExecutor(16) as pool,
    ):
        flood = [pool.submit(ask, service, "a")]
        service.wait_running(1)
        flood += [pool.submit(ask, service, "a") for _ in range(11)]
        eventually(lambda: sum(one.done() for one in flood) == 5, "the flood was cut")
        other = pool.submit(ask, service, "b")
        service.wait_queued(7)
        service.engine.release(100_000)
        assert sorted(one.result().status_code for one in flood) == [200] * 7 + [429] * 5
        assert other.result().status_code == 200


def test_a_key_with_any_number_of_long_answers_leaves_running_rows_for_another(
    pool: ThreadPoolExecutor, file: Path
) -> None:
    engine = scripted("a" * 3000, stepped=True)
    engine.info = replace(engine.info, joins=True)
    with live(engine, api_keys_file=file, max_batch_size=4) as service:

        def step(come: Callable[[], bool]) -> bool:
            engine.release(1)
            return come()

        long = [pool.submit(ask, service, "a", f"a{n}") for n in range(8)]
        waiting = functools.partial(service.sample, "microbatch_queue_depth")
        eventually(lambda: step(lambda: sum(map(len, engine.batches)) == 3 and waiting() == 5), "its share runs")
        other = pool.submit(ask, service, "b", "b", max_tokens=1)
        eventually(lambda: step(other.done), "the other key is answered")
        assert other.result().status_code == 200
        assert not any(one.done() for one in long)
        assert [name[0] for name in engine.batches[0]] == ["a", "a", "a", "b"]
        engine.release(100_000)
        assert {one.result().status_code for one in long} == {200}
