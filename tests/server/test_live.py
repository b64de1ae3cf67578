"""Laws of /internal/live and /internal/state: what they tell, to whom, and that listeners cost the service nothing."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import orjson
import pytest

from batching.events import (
    BatchStarted,
    Outcome,
    QueueChanged,
    RowEnded,
    RowsJoined,
    RowStarted,
    State,
    StateChanged,
    Stepped,
)
from server.observe.live import (
    MOST_LISTENERS,
    MOST_OF_A_CLIENT,
    MOST_WAITING,
    ROWS_KEPT,
    TICKS_KEPT,
    Listener,
    LiveFeed,
    TooManyListeners,
)
from tests.live import LOADING, PATIENCE, Live, eventually, live, scripted
from tests.server.test_app import babble, error_of

SLOW = 3 * MOST_WAITING


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), PATIENCE))


class Ear:
    """Reads one stream of events in a thread, until it ends."""

    def __init__(self, response: httpx2.Response) -> None:
        self.heard: list[dict[str, Any]] = []
        self.over = threading.Event()
        self._thread = threading.Thread(target=self._listen, args=(response,), daemon=True)
        self._thread.start()

    def _listen(self, response: httpx2.Response) -> None:
        with contextlib.suppress(httpx2.TransportError, httpx2.StreamError):
            for line in response.iter_lines():
                if line:
                    self.heard.append(orjson.loads(line.removeprefix("data: ")))
        self.over.set()

    def all(self, kind: str) -> list[Any]:
        return [message[kind] for message in list(self.heard) if kind in message]


@contextlib.contextmanager
def listening(service: Live, **headers: str) -> Iterator[Ear]:
    with service.http() as client, client.stream("GET", "/internal/live", headers=headers) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        ear = Ear(response)
        eventually(lambda: bool(ear.heard), "the history came")
        yield ear


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


# What is told


def test_a_listener_hears_of_each_row_and_of_every_half_second(pool: ThreadPoolExecutor) -> None:
    with live(scripted("Hello!", stepped=True), max_batch_size=2) as service, listening(service) as ear:
        asked = [pool.submit(service.chat, headers={"x-request-id": f"r{n}"}) for n in range(3)]
        service.wait_running()
        service.engine.release(1000)
        assert all(answer.result().status_code == 200 for answer in asked)
        eventually(lambda: len(ear.all("ended")) == 3, "all ends were heard")
        started = {row["id"]: row for row in ear.all("started")}
        ended = {row["id"]: row for row in ear.all("ended")}
        assert set(started) == set(ended) == {"r0", "r1", "r2"}
        measured = {row.id: row for row in service.ended()}
        for name, row in ended.items():
            assert row["ttft"] == measured[name].ttft
            assert row["queue_wait"] == started[name]["queue_wait"] == measured[name].queue_wait
            assert row["batch_size"] == started[name]["batch_size"] == measured[name].batch_size
        numbers = {message["started"]["id"]: message["batch"] for message in ear.heard if "started" in message}
        sharing = [sorted(name for name, number in numbers.items() if number == one) for one in set(numbers.values())]
        assert sorted(sharing) == sorted(sorted(batch) for batch in service.engine.batches)
        eventually(lambda: sum(tick["tokens"] for tick in ear.all("tick")) == 21, "all tokens were heard")
        eventually(lambda: ear.all("tick")[-1]["running"] == 0, "the last tick is quiet")
        assert sum(tick["batch_rows"] for tick in ear.all("tick")) == 3
        assert "Hello" not in str(ear.heard)


def test_a_late_listener_gets_thehistory() -> None:
    with live() as service:
        service.chat(headers={"x-request-id": "before"})
        service.wait_ended()
        with listening(service) as ear:
            history = ear.heard[0]
            assert history["state"] == "ready"
            assert [row["ended"]["id"] for row in history["rows"] if "ended" in row] == ["before"]
            later = [tick["tokens"] for tick in ear.all("tick")]
            eventually(lambda: len(ear.all("tick")) > len(later) + 1, "ticks go on while nothing happens")
            tokens = sum(history["ticks"]["tokens"]) + sum(tick["tokens"] for tick in ear.all("tick"))
            assert tokens == 7
            times = [*history["ticks"]["at"], *(tick["at"] for tick in ear.all("tick"))]
            assert times == sorted(set(times))
            assert history["now"] >= max(history["ticks"]["at"], default=0.0)


def test_rows_that_join_a_batch_have_its_number() -> None:
    feed = LiveFeed()
    joined = RowsJoined(1, 2, 5, (0.0,))
    for event in (
        BatchStarted(1, 5, 5, 0.0, (0.0,)),
        RowStarted("a", 1.0, 0.0, 1),
        joined,
        RowStarted("b", 2.0, 0.0, 2),
        BatchStarted(1, 5, 5, 0.0, (0.0,)),
        RowStarted("c", 3.0, 0.0, 1),
    ):
        feed(event)
    assert [(row["started"].id, row["batch"]) for row in feed.history()["rows"]] == [("a", 1), ("b", 1), ("c", 2)]


def test_what_is_kept_is_bounded() -> None:
    feed = LiveFeed()
    for number in range(10 * ROWS_KEPT):
        feed(RowStarted(f"r{number}", 0.0, 0.0, 1))
        feed(Stepped(1, 1, 1))
    history = feed.history()
    assert len(history["rows"]) == ROWS_KEPT
    assert history["rows"][-1]["started"].id == f"r{10 * ROWS_KEPT - 1}"
    assert len(history["ticks"]["at"]) <= TICKS_KEPT


# Who listens


def test_it_needs_a_key_like_the_rest() -> None:
    with live(api_keys=("sesame",)) as service:
        for path in ("/internal/live", "/internal/state"):
            error_of(service.get(path), 401, "unknown_api_key")
        with listening(service, authorization="Bearer sesame") as ear:
            assert ear.heard[0]["state"] == "ready"


def test_the_head_of_the_stream_alone_is_an_answer_with_an_end() -> None:
    with live() as service, service.connect() as bare:
        bare.sendall(b"HEAD /internal/live HTTP/1.1\r\nHost: x\r\n\r\n")
        bare.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answers = b"".join(iter(lambda: bare.recv(65_536), b""))
    assert answers.count(b"HTTP/1.1 200") == 2
    assert b"text/event-stream" in answers
    assert service.service.live.listeners == 0


def test_a_listener_that_leaves_is_forgotten() -> None:
    with live() as service:
        for _ in range(3):
            with listening(service):
                eventually(lambda: service.service.live.listeners == 1, "one listens")
        eventually(lambda: service.service.live.listeners == 0, "none listens")


def test_there_are_only_so_many() -> None:
    with live() as service, contextlib.ExitStack() as stack:
        for _ in range(MOST_LISTENERS):
            stack.enter_context(listening(service))
        error_of(service.get("/internal/live"), 429, "too_many_listeners")
        assert service.chat().status_code == 200


def test_one_client_leaves_places_for_the_others() -> None:
    async def main() -> None:
        feed = LiveFeed()
        open_streams = [feed.listen("a") for _ in range(MOST_OF_A_CLIENT + 1)]
        first = [await anext(stream, b"") for stream in open_streams]
        assert [bool(frame) for frame in first] == [True] * MOST_OF_A_CLIENT + [False]
        with pytest.raises(TooManyListeners):
            feed.listen("a")
        others = [feed.listen(client) for client in ("b", None)]
        assert all([await anext(stream) for stream in others])
        for stream in (*open_streams, *others):
            await stream.aclose()  # type: ignore[attr-defined]

    run(main)


def test_one_that_does_not_read_is_let_go_and_hurts_nobody() -> None:
    async def main() -> None:
        feed = LiveFeed()
        slow, quick = feed.listen(), feed.listen()
        heard = [await anext(slow), await anext(quick)]
        reading = asyncio.ensure_future(anext(quick))
        for number in range(SLOW):
            feed(RowStarted(f"r{number}", 0.0, 0.0, 1))
            if number % 100 == 0:
                heard.append(await reading)
                reading = asyncio.ensure_future(anext(quick))
        heard.append(await reading)
        waited = [frame async for frame in slow]
        assert b"".join(waited).count(b"started") == MOST_WAITING
        assert b"".join(heard[2:]).count(b"started") == SLOW
        assert feed.listeners == 1
        await quick.aclose()  # type: ignore[attr-defined]
        assert feed.listeners == 0

    run(main)


def test_nothing_is_encoded_while_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[object] = []
    monkeypatch.setattr("server.observe.live.frame", encoded.append)
    with live() as service:
        assert service.chat().status_code == 200
        service.wait_ended()
    assert encoded == []


# The end


@pytest.mark.parametrize("final", [State.STOPPED, State.FAILED])
def test_a_final_state_is_told_and_ends_the_stream(final: State) -> None:
    async def main() -> None:
        feed = LiveFeed()
        stream = feed.listen()
        await anext(stream)
        feed(StateChanged(State.DRAINING))
        feed(StateChanged(final))
        rest = b"".join([frame async for frame in stream])
        assert [line for line in rest.decode().split("\n\n") if "state" in line] == [
            'data: {"state":"draining"}',
            f'data: {{"state":"{final}"}}',
        ]
        assert feed.listeners == 0

    run(main)


def test_a_listener_does_not_hold_up_the_end_of_the_service() -> None:
    with live(scripted(babble, stepped=True)) as service, listening(service) as ear:
        service.drain()
        assert ear.over.wait(PATIENCE)
        assert ear.all("state") == ["ready", "draining", "stopped"]


def test_one_that_comes_after_the_end_hears_of_it_and_no_more() -> None:
    async def main() -> None:
        feed = LiveFeed()
        feed(StateChanged(State.STOPPED))
        [history] = [frame async for frame in feed.listen()]
        assert b'"state":"stopped"' in history

    run(main)


def test_the_stream_ends_when_the_model_cannot_be_loaded() -> None:
    with live(ready=False) as service, listening(service) as ear:
        assert ear.heard[0]["state"] == "starting"
        service.loader.error = RuntimeError("no model")
        service.loader.may_load.set()
        assert ear.over.wait(PATIENCE)
        assert ear.all("state")[-1] == "failed"


def test_a_listener_that_ended_still_gets_what_it_was_told() -> None:
    async def main() -> None:
        listener = Listener(over=False)
        listener.tell(b"a")
        listener.tell(b"b")
        listener.end()
        assert [await listener.take(), await listener.take()] == [b"ab", b""]

    run(main)


@pytest.mark.parametrize(("who", "sees"), [("sesame", {"a"}), ("poppy", {"p"}), ("owner", {"a", "p"})])
def test_a_key_hears_of_its_own_requests_and_an_admin_s_of_everyone_s(who: str, sees: set[str]) -> None:
    keys = ("sesame", "poppy", "owner")
    with live(api_keys=keys, admin_keys=("key-3",)) as service:
        for key, name in (("sesame", "a"), ("poppy", "p")):
            service.chat(headers={"authorization": f"Bearer {key}", "x-request-id": f"{name}1"})
        with listening(service, authorization=f"Bearer {who}") as ear:
            for key, name in (("sesame", "a"), ("poppy", "p")):
                service.chat(headers={"authorization": f"Bearer {key}", "x-request-id": f"{name}2"})
            eventually(lambda: len(ear.all("ended")) == len(sees), "the news came")
            told = [row for row in ear.heard[0]["rows"] if "ended" in row]
            ids = [row["ended"]["id"] for row in told] + [row["id"] for row in ear.all("ended")]
    assert set(ids) == {f"{name}{n}" for name in sees for n in (1, 2)}


# The state


def test_the_state_says_how_far_loading_is_and_then_what_runs() -> None:
    with live(ready=False, queue_size=77) as service:
        starting = service.get("/internal/state").json()
        assert (starting["state"], starting["model"]) == ("starting", None)
        assert starting["loading"] == {"step": LOADING.step, "done": 3, "total": 12}
        service.loader.may_load.set()
        service.wait_state(State.READY)
        ready = service.get("/internal/state").json()
    assert (ready["state"], ready["loading"], ready["names"]) == ("ready", None, ["scripted"])
    assert ready["model"] == {
        "device": "scripted",
        "dtype": "none",
        "parameters": 0,
        "context_window": 4096,
        "token_budget": 1_000_000,
    }
    assert (starting["engine"], ready["engine"]) == (None, "generate")
    assert ready["versions"] == starting["versions"]
    assert set(ready["versions"]) == {"microbatch", "torch", "transformers", "Python"}
    assert ready["limits"]["queue_size"] == 77
    assert set(starting["limits"]) == set(ready["limits"])


def test_events_of_every_kind_are_taken() -> None:
    feed = LiveFeed()
    for event in (
        QueueChanged(1, 1),
        BatchStarted(1, 1, 1, 0.0, (0.0,)),
        RowEnded("r", Outcome.ERROR, "error", 1, 0, None, None, 1.0, 0),
    ):
        feed(event)
    [row] = feed.history()["rows"]
    assert row["ended"].id == "r"
