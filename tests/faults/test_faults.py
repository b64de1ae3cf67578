"""Faults put into a live service at every moment of a request. The law: every accepted request gets exactly one
outcome, nobody is hurt by a neighbour's, and the next request is served."""

import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import httpx2
import orjson
import pytest

from batching.errors import OutOfMemory
from batching.events import Outcome, State
from server.model.text import Text
from server.observe.metrics import Metrics
from server.output.detokenize import Detokenizer
from tests.live import PATIENCE, QUESTION, Live, eventually, live, raw_request, scripted

ANSWER = "Hello!"
STEPS = len(ANSWER) + 1
STALL = 2.0


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def said(answer: httpx2.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def check_quiet(service: Live, requests: int) -> None:
    """So many requests have one outcome each, and nothing is left of them."""
    ids = Counter(event.id for event in service.wait_ended(requests))
    assert set(ids.values()) <= {1}
    assert len(ids) == requests
    eventually(lambda: service.sample("microbatch_running_rows") == 0, "no row runs")
    assert service.sample("microbatch_queue_depth") == service.sample("microbatch_queue_prompt_tokens") == 0
    assert not service.service.batcher._running
    assert not service.service.batcher._announced


def check_serves(service: Live, pool: ThreadPoolExecutor) -> None:
    """The next request is answered as ever."""
    answer = pool.submit(service.chat)
    service.engine.release(100)
    assert said(answer.result()) == ANSWER


def together(service: Live, pool: ThreadPoolExecutor, rows: int) -> list[Future[httpx2.Response]]:
    """So many requests in one batch, every second one streamed. The service's batches hold no more and wait for all."""
    return [pool.submit(service.chat, stream=bool(n % 2)) for n in range(rows)]


# The engine


class Once:
    """Raises at a step of the first batch that comes so far."""

    def __init__(self, step: int, error: BaseException) -> None:
        self._step = step
        self._errors = [error]

    def __call__(self, step: int) -> None:
        if step == self._step and self._errors:
            raise self._errors.pop()


class Panic(BaseException):
    """What libraries in Rust raise where they find themselves at fault: no `Exception`."""


FAULTS = [RuntimeError("secret"), Panic("secret")]


@pytest.mark.parametrize("error", [*FAULTS, OutOfMemory("secret")], ids=["fails", "panics", "out of memory"])
@pytest.mark.parametrize("step", [1, 3, STEPS - 1], ids=["after the first token", "in the midst", "in the last step"])
def test_a_batch_that_fails_late_is_an_error_for_each_of_its_rows(
    step: int, error: BaseException, pool: ThreadPoolExecutor
) -> None:
    with live(scripted(ANSWER, before_step=Once(step, error)), max_batch_size=4, batch_window_ms=10_000) as service:
        for answer in [one.result() for one in together(service, pool, 4)]:
            assert answer.status_code == 500 or (answer.status_code == 200 and "[DONE]" not in answer.text)
            assert '"server_error"' in answer.text
            assert "secret" not in answer.text
        check_quiet(service, 4)
        assert {event.outcome for event in service.ended()} == {Outcome.ERROR}
        answers = together(service, pool, 4)
        assert [answer.result().status_code for answer in answers] == [200] * 4


@pytest.mark.parametrize("error", FAULTS, ids=["fails", "panics"])
def test_a_batch_that_fails_in_its_prompt_is_a_500_for_each_of_its_rows(
    error: BaseException, pool: ThreadPoolExecutor
) -> None:
    engine = scripted(ANSWER, before_step=Once(0, error))
    with live(engine, max_batch_size=4, batch_window_ms=10_000) as service:
        assert [answer.result().status_code for answer in together(service, pool, 4)] == [500] * 4
        check_quiet(service, 4)
        assert [answer.result().status_code for answer in together(service, pool, 4)] == [200] * 4


def test_a_batch_that_runs_out_of_memory_in_its_prompt_is_answered_in_parts(pool: ThreadPoolExecutor) -> None:
    engine = scripted(ANSWER, before_step=Once(0, OutOfMemory("secret")))
    with live(engine, max_batch_size=4, batch_window_ms=10_000) as service:
        assert [answer.result().status_code for answer in together(service, pool, 4)] == [200] * 4
        check_quiet(service, 4)
        assert [len(batch) for batch in engine.batches] == [4, 2, 2]


def test_a_worker_that_dies_is_an_error_for_all_and_the_process_s_end(pool: ThreadPoolExecutor) -> None:
    engine = scripted(ANSWER, stepped=True, before_step=Once(2, SystemExit("scripted")))
    with live(engine, max_batch_size=2, batch_window_ms=10_000) as service:
        running = together(service, pool, 2)
        service.wait_running(2)
        waiting = together(service, pool, 2)
        service.wait_queued(2)
        engine.release(100)
        statuses = [answer.result().status_code for answer in [*running, *waiting]]
        assert statuses == [500, 200, 500, 500]  # the second one's stream had begun
        assert "[DONE]" not in running[1].result().text
        check_quiet(service, 4)
        assert service.get("/health/live").status_code == 503
        assert service.chat().status_code == 503
        eventually(service.service.stopped.is_set, "the process is told to end")
        assert service.service.exit_code == 1


@pytest.mark.parametrize("error", FAULTS, ids=["fails", "panics"])
def test_a_model_whose_loading_fails_is_the_process_s_end(error: BaseException) -> None:
    with live(scripted(ANSWER), ready=False) as service:
        service.loader.error = error
        service.loader.may_load.set()
        eventually(service.service.stopped.is_set, "the process is told to end")
        assert service.service.exit_code == 1
        assert service.get("/health/live").status_code == 503


# What stands around it


def test_observers_that_raise_hurt_nobody(monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor) -> None:
    def fail(metrics: Metrics, event: object) -> None:
        raise ValueError("scripted")

    with live(scripted(ANSWER)) as service:
        with monkeypatch.context() as patch:
            patch.setattr(Metrics, "__call__", fail)
            assert [answer.result().status_code for answer in together(service, pool, 4)] == [200] * 4
            assert service.chat(n=0).status_code == 400
        assert said(service.chat()) == ANSWER


@pytest.mark.parametrize("error", FAULTS, ids=["fails", "panics"])
@pytest.mark.parametrize("part", ["render", "encode"])
def test_a_tokenizer_that_raises_hurts_only_its_request(
    part: str, error: BaseException, monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise error

    with live(scripted(ANSWER, stepped=True)) as service:
        neighbour = pool.submit(service.chat)
        service.wait_running()
        with monkeypatch.context() as patch:
            patch.setattr(Text, part, fail)
            for stream in (True, False):
                answer = service.chat(stream=stream)
                assert answer.status_code == 500
                assert answer.json()["error"]["code"] == "internal_error"
                assert "secret" not in answer.text
        service.engine.release(100)
        assert said(neighbour.result()) == ANSWER
        check_quiet(service, 1)
        check_serves(service, pool)


@pytest.mark.parametrize("error", FAULTS, ids=["fails", "panics"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_decoder_that_raises_ends_only_its_row(
    stream: bool, error: BaseException, monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    push = Detokenizer.push

    def fail_at_second(self: Detokenizer, tokens: list[int]) -> str:
        if hasattr(self, "_seen"):
            raise error
        self._seen = True  # type: ignore[attr-defined]
        return push(self, tokens)

    with live(scripted(ANSWER, stepped=True)) as service:
        with monkeypatch.context() as patch:
            patch.setattr(Detokenizer, "push", fail_at_second)
            asked = pool.submit(service.chat, stream=stream)
            service.wait_running()
            service.engine.release(1)
            eventually(lambda: service.sample("microbatch_output_tokens_total") == 1, "the first token is out")
            service.engine.release(1)
            if stream:
                with pytest.raises(httpx2.RemoteProtocolError):
                    asked.result()
            else:
                assert asked.result().status_code == 500
                assert "secret" not in asked.result().text
        [ended] = service.wait_ended()
        assert ended.outcome is Outcome.CANCELLED
        service.engine.release(1)
        check_quiet(service, 1)
        check_serves(service, pool)


def test_an_event_loop_that_stalls_loses_nothing(pool: ThreadPoolExecutor) -> None:
    over = threading.Event()
    engine = scripted(ANSWER, stepped=True)
    with live(engine, max_batch_size=4) as service:
        answers = together(service, pool, 4)
        service.wait_running()
        with service.connect() as bare:
            ask(bare)
            eventually(lambda: sum(map(len, engine.batches)) + len(service.service.batcher._queue) == 5, "all came")
            service.loop.call_soon_threadsafe(over.wait, STALL)
            engine.release(1000)
            eventually(lambda: engine.steps >= STEPS, "the worker went on alone")
        assert [answer.result().status_code for answer in answers] == [200] * 4
        assert all("[DONE]" in answer.result().text for answer in answers[1::2])
        check_quiet(service, 5)
        check_serves(service, pool)


# Clients that leave, and the end of the service, at every moment

Undo = Callable[[], None]
Moment = Callable[[Live, socket.socket, pytest.MonkeyPatch], Undo]


def ask(bare: socket.socket, *, stream: bool = True) -> None:
    bare.sendall(raw_request(orjson.dumps({"messages": QUESTION, "stream": stream}), "X-Request-Id: leaver"))


def read_to(bare: socket.socket, mark: bytes) -> None:
    """Read an answer up to there and not a byte further."""
    found = b""
    while mark not in found:
        byte = bare.recv(1)
        assert byte, found
        found += byte


def nothing() -> None:
    pass


def in_its_body(service: Live, bare: socket.socket, patch: pytest.MonkeyPatch) -> Undo:
    bare.sendall(raw_request(b'{"messages":', length=1000))
    eventually(lambda: any(each.answering for each in service.connections), "the request is being read")
    return nothing


def while_it_is_tokenized(service: Live, bare: socket.socket, patch: pytest.MonkeyPatch) -> Undo:
    begun, go = threading.Event(), threading.Event()
    encode = Text.encode

    def wait(self: Text, text: str, *, special: bool = False) -> tuple[int, ...]:
        begun.set()
        go.wait(PATIENCE)
        return encode(self, text, special=special)

    patch.setattr(Text, "encode", wait)
    ask(bare)
    assert begun.wait(PATIENCE)
    return go.set


def in_the_queue(service: Live, bare: socket.socket, patch: pytest.MonkeyPatch) -> Undo:
    ask(bare)
    service.wait_queued(1)
    return nothing


def in_the_batch(service: Live, bare: socket.socket, patch: pytest.MonkeyPatch) -> Undo:
    service.engine.release(STEPS)
    service.wait_ended()  # the neighbour's
    ask(bare)
    service.wait_running(2)
    return nothing


def between_tokens(service: Live, bare: socket.socket, patch: pytest.MonkeyPatch) -> Undo:
    in_the_batch(service, bare, patch)
    service.engine.release(2)
    read_to(bare, b"data: ")
    return nothing


def at_the_last_byte(service: Live, bare: socket.socket, patch: pytest.MonkeyPatch) -> Undo:
    in_the_batch(service, bare, patch)
    service.engine.release(STEPS)
    read_to(bare, b"[DONE")
    return nothing


MOMENTS: dict[str, Moment] = {
    "in its body": in_its_body,
    "while it is tokenized": while_it_is_tokenized,
    "in the queue": in_the_queue,
    "in the batch": in_the_batch,
    "between tokens": between_tokens,
    "at the last byte": at_the_last_byte,
}
"""Where a request can be when something happens."""

NOT_ACCEPTED = ("in its body", "while it is tokenized")


def has_left(service: Live, address: tuple[str, int]) -> bool:
    """Whether nobody is waited for at this end of a connection."""
    at = [each for each in service.connections if each.transport.get_extra_info("peername") == address]
    return all(each.client_ended for each in at)


@contextlib.contextmanager
def beside_a_neighbour(pool: ThreadPoolExecutor) -> Iterator[tuple[Live, Future[httpx2.Response]]]:
    """A service of one row a batch, in which somebody's answer is on its way."""
    with live(scripted(ANSWER, stepped=True), max_batch_size=1) as service:
        neighbour = pool.submit(service.chat, headers={"x-request-id": "neighbour"})
        service.wait_running()
        yield service, neighbour


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_client_may_leave_at_any_moment(
    moment: str, monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    outcome = {"in its body": None, "at the last byte": Outcome.ANSWERED}.get(moment, Outcome.CANCELLED)
    with beside_a_neighbour(pool) as (service, neighbour):
        with service.connect() as bare:
            undo = MOMENTS[moment](service, bare, monkeypatch)
            address = bare.getsockname()
        eventually(lambda: has_left(service, address), "the departure is noticed")
        undo()
        if outcome is Outcome.CANCELLED:
            eventually(lambda: "leaver" in [event.id for event in service.ended()], "its row ended")
        service.engine.release(100)
        assert said(neighbour.result()) == ANSWER
        eventually(lambda: not service.connections, "no connection is left")
        check_quiet(service, 1 if outcome is None else 2)
        outcomes = {event.id: event.outcome for event in service.ended()}
        assert outcomes.get("leaver") == outcome
        assert outcomes["neighbour"] is Outcome.ANSWERED
        check_serves(service, pool)
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_service_may_be_told_to_stop_at_any_moment(
    moment: str, monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    accepted = moment not in NOT_ACCEPTED
    with beside_a_neighbour(pool) as (service, neighbour), service.connect() as bare:
        undo = MOMENTS[moment](service, bare, monkeypatch)
        service.drain()
        eventually(lambda: service.service.batcher.state is not State.READY, "the drain began")
        undo()
        service.engine.release(100)
        assert said(neighbour.result()) == ANSWER
        service.wait_state(State.STOPPED)
        eventually(service.service.stopped.is_set, "the process is told to end")
        outcomes = {event.id: event.outcome for event in service.ended()}
        # What was accepted is finished, and what was not is told to come back.
        assert outcomes == {"neighbour": Outcome.ANSWERED} | ({"leaver": Outcome.ANSWERED} if accepted else {})
        if moment == "in its body":
            bare.sendall(b" " * 1000)
        if not accepted:
            assert bare.recv(65536).startswith((b"HTTP/1.1 503", b"HTTP/1.1 400"))
        assert not service.service.batcher._running
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stop_that_cannot_wait_is_an_error_for_what_is_left(
    moment: str, monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    accepted = moment not in NOT_ACCEPTED
    with beside_a_neighbour(pool) as (service, neighbour), service.connect() as bare:
        undo = MOMENTS[moment](service, bare, monkeypatch)
        object.__setattr__(service.service.settings, "drain_timeout_s", 0.0)
        service.drain()
        eventually(service.service.stopped.is_set, "it has stopped")
        undo()
        ids = Counter(event.id for event in service.ended())
        assert ids == Counter(["neighbour"] + ["leaver"] * accepted)
        assert neighbour.result().status_code in (200, 503)
        assert service.chat().status_code == 503
