"""Prompt-lookup speculation: a row's next tokens are guessed from its own text and checked in one forward pass.

A draft continues the latest earlier place at which the row's last tokens stood (Saxena 2023, prompt lookup decoding).
The check is exact: what is sampled at a position depends on the row's tokens, its seed and the position alone, so the
answer is the same with and without drafts, and a draft is accepted as far as its tokens are the ones that were sampled.
`triton_sampling.advance` is the twin of `propose` and `History` on a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

MAX_DRAFT_TOKENS = 3
"""Tokens drafted at most in a step, by default: with their row's newest token they fill the tile in which decode
attention multiplies queries, where four heads share their keys (as in Qwen3-4B)."""

MIN_MATCH, MAX_MATCH = 2, 4
"""How many of a row's last tokens must have stood at an earlier place, and how many are compared at most."""

WEIGHT = 0.25
"""Weight of the newest outcome in a row's acceptance rate: few outcomes show where a quotation begins and ends."""

MAX_HISTORY = 65_536
"""Tokens of a row's text in which drafts are looked for. A row with more has none."""


def preface(prompt: Sequence[int], prediction: Sequence[int], max_tokens: int) -> list[int]:
    """The text in which drafts are looked for before the first output token.

    It ends like the prompt. Before its last tokens stands the client's `prediction` of the answer, after the same
    tokens, so that it is what followed them at their latest earlier place.
    """
    if not prediction:
        return list(prompt)
    return [*prompt, *prompt[-MAX_MATCH:], *prediction[:max_tokens], *prompt[-MAX_MATCH:]]


class History:
    """The text of a row, to which output tokens are added, and its acceptance rate.

    `rate` is the share of drafted tokens that were right lately, those included that were only looked up.
    """

    def __init__(self, tokens: Sequence[int], max_tokens: int) -> None:
        self._tokens = np.zeros(min(len(tokens) + max_tokens + MAX_DRAFT_TOKENS, MAX_HISTORY), dtype=np.int32)
        self._length = 0
        self.rate = 0.0
        self.add(tokens)

    def add(self, tokens: Sequence[int]) -> None:
        end = self._length + len(tokens)
        if end <= len(self._tokens):
            self._tokens[self._length : end] = tokens
        self._length = end

    def propose(self, count: int) -> list[int]:
        """A draft of `count` tokens, or an empty one."""
        if self._length > len(self._tokens):
            return []
        return propose(self._tokens[: self._length], count)

    def judge(self, num_right: int, num_wanted: int) -> None:
        """`num_right` tokens of a draft were right. All of `num_wanted` would have been better."""
        for outcome in [1.0] * num_right + [0.0] * (num_right < num_wanted):
            self.rate += WEIGHT * (outcome - self.rate)


def propose(text: NDArray[np.int32], count: int) -> list[int]:
    """What followed at the latest of the places where most of the text's last tokens stood before, at least MIN_MATCH
    of them. A text that repeats itself there is continued as its repetition."""
    length = len(text)
    if length <= MIN_MATCH:
        return []
    ends = np.flatnonzero(text[1 : length - 1] == text[-1]) + 1
    ends = ends[text[ends - 1] == text[-2]]
    if not len(ends):
        return []
    for back in range(MIN_MATCH, MAX_MATCH):
        longer = ends[ends >= back]
        longer = longer[text[longer - back] == text[-1 - back]] if length > back else longer[:0]
        if not len(longer):
            break
        ends = longer
    start = int(ends[-1]) + 1
    return [int(text[start + place % (length - start)]) for place in range(count)]


def num_matching(draft: Sequence[int], sampled: Sequence[int]) -> int:
    """How many tokens of a draft are the ones that were sampled, from the first on."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(draft, sampled, strict=False)))


@dataclass(frozen=True, slots=True)
class StepCost:
    """Measured seconds of a decode step: `one` with a single token, and `more` for each further one."""

    one: float
    more: float

    def worth_drafting(self, rate: float, num_rows: int, limit: int) -> int:
        """How many tokens to draft for a row: each as long as its chance of acceptance is worth more than its time.

        A step of all rows gives a token each, so a further token is worth its share of the step's time.
        """
        price = self.more * num_rows / (self.one + self.more * (num_rows - 1))
        count, chance = 0, rate
        while count < limit and chance > price:
            count, chance = count + 1, chance * rate
        return count
