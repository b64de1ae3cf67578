"""Compiling what clients sent: within limits that are enforced, in turn, and without a trace in others' answers."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

from batching.types import TokenBitmask
from server.grammar import sandbox
from server.grammar.compiler import MAX_TRIALS, Grammars, TokenMatcher
from server.grammar.json_schema import Schema
from server.grammar.process import BEGUN, MEMORY, WALL_SECONDS
from server.grammar.sandbox import ROOT, Sandbox
from server.grammar.source import Part, PartError, Plan
from server.http.errors import ApiError
from server.output.reasoning import ThoughtState
from tests.grammars import ANY_OBJECT, INT, TEXT, Kit, kit_of, refusal, run, strict
from tests.live import eventually

pytestmark = pytest.mark.model
ENDLESS: Schema = {"allOf": [{"type": "string", "pattern": f"^.*x{n}.*$"} for n in range(39)]}
"""Less than 2 KiB that take a compiler a time without end, and 22 MiB a second."""


@pytest.fixture
def demo() -> Kit:
    return kit_of("demo")


async def only_trial(grammars: Grammars) -> psutil.Process:
    """The process of the one trial that is going on, once it is."""
    assert grammars._sandbox._process is not None
    process = psutil.Process(grammars._sandbox._process.pid)
    over = process.children()  # those of answered requests, until they are reaped

    def going_on() -> list[psutil.Process]:
        return [each for each in process.children() if each not in over]

    await asyncio.to_thread(eventually, lambda: len(going_on()) == 1, "a grammar is being tried")
    [trial] = going_on()
    return trial


# Limits


def test_an_endless_compilation_ends_as_a_refusal_and_delays_no_other_client(demo: Kit) -> None:
    async def main() -> None:
        grammars = Grammars(demo.tokenizer)
        await grammars.of(strict({"const": "ready"}))
        attack = asyncio.create_task(grammars.of(strict(ENDLESS), client="a"))
        trial = await only_trial(grammars)
        trial.suspend()  # however long the others take, it is still there
        for n in range(20):
            await grammars.of(strict({"const": n}), client="b")
        assert not attack.done()
        trial.resume()
        with pytest.raises(ApiError, match="too much time or memory") as caught:
            await attack
        assert (caught.value.status, caught.value.param) == (400, "response_format")
        assert await grammars.of(strict({"const": "after"}), client="a")

    run(main())


def test_a_process_that_tries_grammars_gets_no_more_memory_than_allowed() -> None:
    hog = f"""
from server.grammar.process import _be_limited
_be_limited()
held = bytearray({MEMORY // 2})
try:
    bytearray({MEMORY})
except MemoryError:
    raise SystemExit(7) from None
"""
    assert subprocess.run([sys.executable, "-c", hog], timeout=WALL_SECONDS).returncode == 7


def test_an_endless_compilation_outlives_its_service_by_no_more_than_its_limit(demo: Kit, tmp_path: Path) -> None:
    """Nothing is left even where the process ends without a word, as by a kill."""
    service = """
import asyncio, json, os, sys
from server.grammar.sandbox import ROOT, Sandbox
from server.grammar.source import Part, Plan

async def main():
    sandbox = Sandbox(open("tokenizer.json").read(), None)
    endless = Part(json.loads(sys.argv[1]), True, "x")
    trial = asyncio.create_task(sandbox.write(Plan(("start: answer", "answer: a0"), (endless,))))
    while sandbox._process is None:
        await asyncio.sleep(0.01)
    print(sandbox._process.pid, flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    os._exit(0)

asyncio.run(main())
"""
    (tmp_path / "tokenizer.json").write_text(demo.tokenizer.backend_tokenizer.to_str())
    process = subprocess.Popen(
        [sys.executable, "-c", service, json.dumps(ENDLESS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        sandbox = psutil.Process(int(process.stdout.readline()))
        eventually(lambda: len(sandbox.children()) == 1, "a grammar is being tried")
        [trial] = sandbox.children()
        process.stdin.write(b"\n")
    assert process.returncode == 0
    eventually(lambda: not sandbox.is_running() and not trial.is_running(), "both have ended")


@pytest.mark.parametrize("answer", [b"", b'{"source": "st'])
def test_a_trial_that_is_stopped_before_it_has_answered_is_a_refusal(answer: bytes) -> None:
    class Stopped(Sandbox):
        async def _ask(self, line: bytes) -> bytes:
            return BEGUN + answer

    with pytest.raises(PartError, match="too much time or memory"):
        run(Stopped("", None).write(Plan(("start: answer", "answer: a0"), (ANY_OBJECT,))))


def test_the_largest_schema_is_within_the_limits(demo: Kit) -> None:
    properties = {f"property number {n}": TEXT | {"description": "x" * 100} for n in range(1000)}
    assert run(Grammars(demo.tokenizer).of(strict({"type": "object", "properties": properties})))


# Faults


def test_a_process_that_was_killed_is_replaced(demo: Kit) -> None:
    async def main() -> None:
        grammars = Grammars(demo.tokenizer)
        await grammars.of(strict({"const": 1}))
        first = grammars._sandbox._process
        assert first is not None
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert await grammars.of(strict({"const": 2}))

    run(main())


def test_a_process_that_hangs_is_replaced_and_nobody_waits_for_it(demo: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        grammars = Grammars(demo.tokenizer)
        await grammars.of(strict({"const": 1}))
        first = grammars._sandbox._process
        assert first is not None
        first.send_signal(signal.SIGSTOP)
        usual = sandbox.ANSWER_SECONDS
        monkeypatch.setattr(sandbox, "ANSWER_SECONDS", 0.1)
        with pytest.raises(ApiError) as caught:
            await grammars.of(strict({"const": 2}))
        assert (caught.value.status, caught.value.code) == (503, "compiler_busy")
        first.wait()
        monkeypatch.setattr(sandbox, "ANSWER_SECONDS", usual)
        assert await grammars.of(strict({"const": 2}))

    run(main())


def test_a_process_that_hangs_does_not_hold_up_the_event_loop(demo: Kit) -> None:
    async def main() -> None:
        box = Sandbox(demo.tokenizer.backend_tokenizer.to_str(), None)
        box.start()
        assert box._process is not None
        box._process.send_signal(signal.SIGSTOP)
        for _ in range(10_000):  # far more than the socket holds
            asked = asyncio.create_task(box._ask(b"\n"))
            await asyncio.sleep(0)
            if asked.done():
                break
            asked.cancel()
        box._process.kill()
        with pytest.raises(BlockingIOError):
            await asked

    run(main())


def test_a_process_that_is_replaced_leaves_no_descriptor_behind(demo: Kit) -> None:
    async def main() -> None:
        sandbox = Sandbox(demo.tokenizer.backend_tokenizer.to_str(), None)
        sandbox.start()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            assert sandbox._process is not None
            sandbox._process.kill()
            sandbox._process.wait()
            sandbox.start()
        assert len(os.listdir("/proc/self/fd")) <= before

    run(main())


def test_where_no_process_can_be_started_a_schema_is_not_called_wrong(
    demo: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    for program in ("/bin/false", "/nonexistent"):
        monkeypatch.setattr(sys, "executable", program)
        grammars = Grammars(demo.tokenizer)
        with pytest.raises(ApiError) as caught:
            run(grammars.of(strict({"const": 1})))
        assert (caught.value.status, caught.value.code) == (503, "compiler_busy")
        assert run(grammars.of(ANY_OBJECT)), "what no client made needs no trial"


def test_processes_end_with_what_they_are_for(demo: Kit) -> None:
    before = {child.pid for child in psutil.Process().children()}
    grammars = Grammars(demo.tokenizer)
    run(grammars.of(strict({"const": 1})))
    [started] = [child for child in psutil.Process().children() if child.pid not in before]  # a trial is its child
    del grammars
    assert not started.is_running()


def test_a_trial_leaves_no_descriptor_behind(demo: Kit) -> None:
    async def main() -> None:
        grammars = Grammars(demo.tokenizer)
        await grammars.of(strict({"const": "first"}))
        await asyncio.sleep(0)
        before = len(os.listdir("/proc/self/fd"))
        for n in range(10):
            await grammars.of(strict({"const": n}))
        await asyncio.sleep(0)
        assert len(os.listdir("/proc/self/fd")) <= before

    run(main())


# What is known


class Counting(Sandbox):
    """Counts what is tried."""

    tried = 0

    async def write(self, plan: Plan) -> sandbox.Written:
        self.tried += 1
        return await super().write(plan)


def counted(demo: Kit, **options: Any) -> tuple[Grammars, Counting]:
    grammars = Grammars(demo.tokenizer, **options)
    counting = Counting(demo.tokenizer.backend_tokenizer.to_str(), demo.tokenizer.eos_token_id)
    grammars._sandbox = counting
    return grammars, counting


def test_what_is_known_is_not_tried_again_whoever_asks(demo: Kit) -> None:
    async def main() -> None:
        grammars, counting = counted(demo)
        await grammars.of(strict({"const": 0}), client="a")
        await grammars.of(Part({"const": 0}, True, "elsewhere"), client="b")
        assert counting.tried == 1
        await grammars.of(Part({"const": 0}, False, "elsewhere"))
        assert counting.tried == 2, "one that is not strict may be read otherwise"
        await asyncio.gather(*(grammars.of(strict({"const": "new"})) for _ in range(3 * MAX_TRIALS)))
        assert counting.tried == 3
        await grammars.of(ANY_OBJECT)
        assert counting.tried == 3

    run(main())


def test_no_more_is_remembered_than_allowed_and_the_latest_longest(demo: Kit) -> None:
    async def main() -> None:
        grammars, counting = counted(demo, known_bytes=1500)
        for n in range(12):
            await grammars.of(strict({"const": n}))
            await grammars.of(strict({"const": 0}))
        assert counting.tried == 12
        assert 1 < len(grammars._known) < 12
        await grammars.of(strict({"const": 1}))
        assert counting.tried == 13
        await grammars.of(strict({"enum": ["x" * 1500, "y"]}))
        assert len(grammars._known) == 0

    run(main())


def test_grammars_that_take_much_memory_are_refused_where_there_is_none_left(demo: Kit) -> None:
    large = {"type": "object", "properties": {f"property number {n}": TEXT for n in range(1000)}}

    async def main() -> None:
        grammars = Grammars(demo.tokenizer)
        probe = await grammars.of(strict(large))
        [(_, memory)] = grammars._held.values()
        assert memory > 0
        del probe
        tight = Grammars(demo.tokenizer, held_bytes=2 * memory + memory // 2)
        held = await tight.of(strict(large), client="a")
        with pytest.raises(ApiError) as caught:
            await tight.of(strict(large), client="a")
        assert (caught.value.status, caught.value.code) == (503, "compiler_busy")
        assert await tight.of(strict({"const": 1}), client="a"), "what takes little is not held back"
        other = await tight.of(strict(large), client="b")
        with pytest.raises(ApiError):
            await tight.of(strict(large), client="c")
        del held
        assert await tight.of(strict(large), client="a")
        del other

    run(main())


def test_a_client_that_leaves_leaves_nothing_behind(demo: Kit) -> None:
    async def main() -> None:
        grammars = Grammars(demo.tokenizer)
        for n in range(8):
            task = asyncio.create_task(grammars.of(strict({"const": n})))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert await grammars.of(strict({"const": "after"}))
        assert not grammars._trying

    run(main())


def test_a_trial_ends_with_the_last_that_waits_for_it(demo: Kit) -> None:
    """A process that is stopped reaches no limit of its own."""

    async def main() -> None:
        grammars = Grammars(demo.tokenizer)
        await grammars.of(strict({"const": "ready"}))
        first, second = (asyncio.create_task(grammars.of(strict(ENDLESS), client="a")) for _ in range(2))
        trial = await only_trial(grammars)
        trial.suspend()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert trial.is_running()
        assert not second.done()
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        await asyncio.to_thread(eventually, lambda: not trial.is_running(), "the trial has ended")
        assert await grammars.of(strict({"const": "after"}), client="a"), "its client's turn is free"

    run(main())


def test_who_asks_for_what_was_just_given_up_is_answered(demo: Kit) -> None:
    """What was given up has not ended yet when the others come."""

    class Held(Counting):
        begun, released = asyncio.Event(), asyncio.Event()

        async def write(self, plan: Plan) -> sandbox.Written:
            self.begun.set()
            try:
                await self.released.wait()
            except asyncio.CancelledError:
                await self.released.wait()
                raise
            return await super().write(plan)

    async def main() -> None:
        grammars = Grammars(demo.tokenizer)
        grammars._sandbox = held = Held(demo.tokenizer.backend_tokenizer.to_str(), demo.tokenizer.eos_token_id)
        gone = asyncio.create_task(grammars.of(strict({"const": 1})))
        await held.begun.wait()
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        others = [asyncio.create_task(grammars.of(strict({"const": 1}))) for _ in range(8)]
        trials = grammars._trying
        await asyncio.to_thread(eventually, lambda: [t.waiting for t in trials.values()] == [8], "all others wait")
        held.released.set()
        assert all(await asyncio.gather(*others))
        assert held.tried == 1, "what was given up never ended"
        assert not grammars._trying

    run(main())


def test_a_client_with_too_many_in_waiting_is_told_to_come_back_and_others_are_not(demo: Kit) -> None:
    async def main() -> None:
        grammars = Grammars(demo.tokenizer)
        await grammars.of(strict({"const": "ready"}))
        asked = [grammars.of(strict({"const": n}), client="a") for n in range(MAX_TRIALS + 10)]
        other = grammars.of(strict({"const": "other"}), client="b")
        *answers, last = await asyncio.gather(*asked, other, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, ApiError)]
        assert not isinstance(last, BaseException)
        assert {(error.status, error.headers["retry-after"]) for error in refused} == {(503, "5")}
        assert len(refused) <= 10

    run(main())


# Rows of one grammar

WEARING = TEXT | {"pattern": "^([a-z ]|\\n)*a[a-z ]{200}$"}
"""A lexer of this has more states than it may, after a hundred tokens at random."""


def allowed(demo: Kit, matcher: TokenMatcher) -> TokenBitmask:
    words: TokenBitmask = np.zeros(-(-demo.width // 32), np.int32)
    matcher.fill(words)
    return words


def wear_out(demo: Kit, matcher: TokenMatcher) -> None:
    with pytest.raises(ValueError, match="too many states"):
        draw(demo, matcher, 2000)


def draw(demo: Kit, matcher: TokenMatcher, tokens: int) -> None:
    dice = np.random.default_rng(0)
    for _ in range(tokens):
        bits = np.unpackbits(allowed(demo, matcher).view(np.uint8), bitorder="little")
        matcher.advance(int(dice.choice(np.flatnonzero(bits))))


def test_an_answer_that_passes_its_limits_changes_nothing_for_others_of_the_same_schema(demo: Kit) -> None:
    early, other, late, expected = (run(demo.grammars.of(strict(WEARING))).matcher() for _ in range(4))
    text = demo.encode('"some words that came before')
    for token in text[:4]:
        early.advance(token)
        expected.advance(token)
    wear_out(demo, other)
    for token in text[:4]:
        late.advance(token)
    for token in text[4:]:
        for matcher in (early, late):
            assert (allowed(demo, matcher) == allowed(demo, expected)).all()
            matcher.advance(token)
        expected.advance(token)
    assert (allowed(demo, early) == allowed(demo, late)).all()


def test_a_pattern_that_no_answer_could_be_held_to_is_found_out_by_a_few_steps(demo: Kit) -> None:
    schema = TEXT | {"pattern": ".*a.{500}b.*"}
    for thought in ThoughtState:
        assert "too complex" in refusal(demo.grammars.of(strict(schema), thought=thought)).message
    grammar = run(demo.grammars.of(Part(schema, False, "response_format")))
    assert demo.accepts(grammar, '"anything"')
    assert not demo.accepts(grammar, "1")


@pytest.mark.parametrize("where", [lambda text: {"const": text}, lambda text: {"properties": {text: INT}}])
def test_what_is_written_out_word_by_word_is_bounded(demo: Kit, where: Callable[[str], Schema]) -> None:
    """Each step takes time in proportion, for every row that has such a grammar."""
    assert run(demo.grammars.of(strict(where("x" * 1000))))
    assert "too long" in refusal(demo.grammars.of(strict(where("x" * 100_000)))).message
