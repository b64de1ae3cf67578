"""Stand-ins that implement the public protocols, for tests that need exact control and no model."""

import threading
from collections.abc import Callable, Sequence

from batching.engine import Steps
from batching.stream import Row
from batching.types import ModelInfo, Request

INFO = ModelInfo(
    device="scripted",
    dtype="none",
    parameters=0,
    vocab_size=1000,
    context_window=512,
    token_budget=4096,
    stop_token_ids=frozenset({0}),
)

Script = Callable[[Request, int], int]
"""The token that a request gets at a position of its answer."""


def counting(request: Request, position: int) -> int:
    """1, 2, 3, ... for every request."""
    return position + 1


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
        position = 0
        while not all(row.over for row in rows):
            if self._gate is not None:
                self._gate.acquire()
            self._before_step(position)
            steps.emit(rows, [self._script(row.request, row.num_output_tokens) for row in rows])
            if self.info.joins:
                joined = steps.admit()
                self.batches[-1] += [row.request.id for row in joined]
                rows += joined
            position += 1
            self.steps += 1

    def memory(self) -> int:
        return 0
