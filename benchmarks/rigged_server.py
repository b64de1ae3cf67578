"""`python -m benchmarks.rigged_server`: the real service around an engine that fails now and then, or only keeps time.

    --fail-every N   about every N-th step raises: a fault of the engine, or a shortage of memory
    --step-ms M      no model: each step takes M milliseconds, whatever the number of rows

All other flags are those of `python -m server`.
"""

import argparse
import random
import time
from collections.abc import Mapping, Sequence

from batching.engine import NO_LOGPROBS, Engine, Steps
from batching.errors import OutOfMemory
from batching.progress import Progress
from batching.stream import Row
from batching.types import ModelInfo, PromptLogprob, TokenLogprob
from server.__main__ import run
from server.model.defaults import Defaults
from server.model.loader import Loading, ModelLoader
from server.model.text import Text
from server.service import Loader
from server.settings import Settings, parse

WORDS = " the lamp of a lighthouse turns above the sea while its keeper reads the weather and writes it down again"


class FailingSteps:
    """`Steps` that sometimes raise instead of taking a token."""

    def __init__(self, steps: Steps, dice: random.Random, every: int) -> None:
        self._steps = steps
        self._dice = dice
        self._every = every

    def emit(
        self, rows: Sequence[Row], tokens: Sequence[int], logprobs: Mapping[int, TokenLogprob] = NO_LOGPROBS
    ) -> list[bool]:
        if self._dice.random() * self._every < 1:
            raise self._dice.choice([RuntimeError("rigged"), OutOfMemory("rigged")])
        return self._steps.emit(rows, tokens, logprobs)

    def emit_prompt(self, row: Row, start: int, logprobs: Sequence[PromptLogprob | None]) -> bool:
        return self._steps.emit_prompt(row, start, logprobs)

    def admit(self) -> list[Row]:
        return self._steps.admit()


class FailingEngine:
    """An engine whose steps fail now and then."""

    def __init__(self, engine: Engine, every: int) -> None:
        self._engine = engine
        self._dice = random.Random(0)
        self._every = every

    @property
    def info(self) -> ModelInfo:
        return self._engine.info

    def run(self, rows: Sequence[Row], steps: Steps) -> None:
        self._engine.run(rows, FailingSteps(steps, self._dice, self._every))

    def memory(self) -> int:
        return self._engine.memory()


class PacedEngine:
    """Answers with words, the same to the same prompt, at a step's time for each, so that its capacity is known."""

    def __init__(self, words: Sequence[int], info: ModelInfo, step: float) -> None:
        self.info = info
        self._words = words
        self._step = step

    def run(self, rows: Sequence[Row], steps: Steps) -> None:
        starts = [sum(row.request.prompt) for row in rows]
        over, position = [False], 0
        while not all(over):
            time.sleep(self._step)
            over = steps.emit(rows, [self._words[(start + position) % len(self._words)] for start in starts])
            position += 1

    def memory(self) -> int:
        return 0


class RiggedLoader:
    """`Loader` of the settings' model, or of a paced engine with its tokenizer."""

    def __init__(self, settings: Settings, progress: Progress, *, step: float, fail_every: int) -> None:
        self._loader: Loader = ModelLoader(settings, progress)
        self._step = step
        self._fail_every = fail_every

    @property
    def loading(self) -> Loading:
        return self._loader.loading

    def defaults(self) -> Defaults:
        return self._loader.defaults()

    def text(self) -> Text:
        return self._loader.text()

    def engine(self) -> Engine:
        engine = self._paced() if self._step else self._loader.engine()
        return FailingEngine(engine, self._fail_every) if self._fail_every else engine

    def _paced(self) -> PacedEngine:
        text = self._loader.text()
        words = text.encode(WORDS)
        info = ModelInfo(
            "paced", "none", 0, text.vocabulary.tokenizer.get_vocab_size(), 8192, 10**9, text.stop_token_ids
        )
        return PacedEngine(words, info, self._step)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rigged_server", allow_abbrev=False)
    parser.add_argument("--fail-every", type=int, default=0)
    parser.add_argument("--step-ms", type=float, default=0.0)
    rigging, flags = parser.parse_known_args()
    settings = parse(flags)
    progress = Progress()
    loader = RiggedLoader(settings, progress, step=rigging.step_ms / 1000, fail_every=rigging.fail_every)
    run(settings, loader, progress)


if __name__ == "__main__":
    main()
