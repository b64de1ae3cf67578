"""Stand-ins that implement the public protocols, for tests that need exact control and no model."""

import threading
from collections.abc import Callable, Sequence

from batching.engine import Steps
from batching.stream import Row
from batching.types import ModelInfo, PromptLogprob, Request

INFO = ModelInfo(
    device="scripted",
    dtype="none",
    parameters=0,
    vocab_size=1000,
    context_window=4096,
    token_budget=4096,
    stop_token_ids=frozenset({0}),
)

Script = Callable[[Request, int], int]
"""The token that a request gets at a position of its answer."""


def counting(request: Request, position: int) -> int:
    """1, 2, 3, ... for every request."""
    return position + 1


SCORED = 3
"""Tokens of a prompt whose log probabilities a scripted engine hands over at a time."""


def prompt_logprob(token: int, top: int) -> PromptLogprob:
    """What a scripted engine says of a prompt's token: minus an eighth of its id, and of each after it one less."""
    likeliest = tuple(((token + n) % 257, -token / 8 - n) for n in range(top))
    return PromptLogprob(token, -token / 8, likeliest, rank=1)


class ScriptedEngine:
    """`Engine` whose tokens come from a script, and whose steps wait to be released one by one if `stepped`.

    `batches` records the request ids of every batch. Rows may join one at every step if `info` says so. `before_step`
    is called with the step's number on the worker thread; what it raises is raised by `run`.
    """

    def __init__(
        self,
        script: Script = counting,
        *,
        stepped: bool = False,
        info: ModelInfo = INFO,
        before_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.info = info
        self.batches: list[list[str]] = []
        self.steps = 0
        self._script = script
        self._before_step = before_step
        self._gate = threading.Semaphore(0) if stepped else None

    def release(self, steps: int = 1) -> None:
        """Let so many more steps happen."""
        assert self._gate is not None
        self._gate.release(steps)

    def run(self, rows: Sequence[Row], steps: Steps) -> None:
        rows = list(rows)
        self.batches.append([row.request.id for row in rows])
        self._score(rows, steps)
        position = 0
        while not all(row.over for row in rows):
            if self._gate is not None:
                self._gate.acquire()
            self._before_step(position)
            steps.emit(rows, [self._script(row.request, row.num_output_tokens) for row in rows])
            if self.info.joins:
                joined = steps.admit()
                self.batches[-1] += [row.request.id for row in joined]
                self._score(joined, steps)
                rows += joined
            position += 1
            self.steps += 1

    def _score(self, rows: Sequence[Row], steps: Steps) -> None:
        for row in rows:
            top = row.request.sampling.prompt_logprobs
            if top is not None:
                _, *others = row.request.prompt
                told = [None, *(prompt_logprob(token, top) for token in others)]
                for start in range(0, len(told), SCORED):
                    steps.emit_prompt(row, start, told[start : start + SCORED])

    def memory(self) -> int:
        return 0
