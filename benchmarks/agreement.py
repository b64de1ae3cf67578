"""How far the packed engine's logits are from transformers' own, and those of its two attentions from each other.

Teacher-forced: the reference is given the tokens that the engine chose, so that every position can be compared.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from batching.engine import NO_LOGPROBS
from batching.packed.engine import PackedEngine
from batching.packed.runner import RunningSequence, SamplerOutput
from batching.stream import Row
from batching.types import TokenLogprob
from benchmarks.engine_rows import Clock, Shape, rows_of

SHAPES = [Shape(512 + 37 * number, 24) for number in range(4)]


class Told(Clock):
    """A `Clock` that keeps each row's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: dict[Row, list[int]] = {}

    def emit(
        self, rows: Sequence[Row], tokens: Sequence[int], logprobs: Mapping[int, TokenLogprob] = NO_LOGPROBS
    ) -> list[bool]:
        for row, token in zip(rows, tokens, strict=True):
            if not row.over:
                self.tokens.setdefault(row, []).append(token)
        return super().emit(rows, tokens, logprobs)


class Agreement:
    """`reference` is the same model with its own layers. It stays in memory until `errors` was called."""

    def __init__(self, reference: PreTrainedModel) -> None:
        self._reference = reference

    @torch.inference_mode()
    def errors(self, engine: PackedEngine) -> dict[str, float]:
        """Relative errors (norm of the difference / norm), of all positions together and the largest of one; and the
        share of tokens that agree."""
        told, logits = Told(), Logits(engine)
        rows = rows_of(SHAPES, engine.info.vocab_size, seed=99)
        with logits:
            engine.run(rows, told)
        packed, eager, reference = list[Tensor](), list[Tensor](), list[Tensor]()
        for row in rows:
            answer = told.tokens[row]
            packed.append(torch.stack(logits.of[row][: len(answer)]).float())
            eager.append(self._logits(row, answer, "eager"))
            reference.append(self._logits(row, answer, "sdpa"))
        found = compared("packed", torch.cat(packed), torch.cat(reference))
        return found | compared("eager", torch.cat(eager), torch.cat(reference))

    def _logits(self, row: Row, answer: Sequence[int], attention: str) -> Tensor:
        self._reference.set_attn_implementation(attention)
        ids = torch.tensor([[*row.request.prompt, *answer[:-1]]], device=self._reference.device)
        found: Tensor = self._reference(ids, use_cache=False, logits_to_keep=len(answer)).logits[0].float()
        return found


def compared(name: str, found: Tensor, reference: Tensor) -> dict[str, float]:
    """[positions, vocabulary] each."""
    difference = found - reference
    by_position = difference.norm(dim=-1) / reference.norm(dim=-1)
    same = found.argmax(-1) == reference.argmax(-1)
    return {
        f"logits, {name} against SDPA, relative error": (difference.norm() / reference.norm()).item(),
        f"logits, {name} against SDPA, largest of a position": by_position.max().item(),
        f"tokens on which {name} and SDPA agree, share": same.float().mean().item(),
    }


class Logits:
    """While it is entered: keeps, `of` each row, the logits that each of its tokens was sampled from."""

    def __init__(self, engine: PackedEngine) -> None:
        self._runner = engine.runner
        self._sample = self._runner.sample
        self.of: dict[Row, list[Tensor]] = {}

    def __enter__(self) -> None:
        self._runner.sample = self._listening  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        self._runner.sample = self._sample  # type: ignore[method-assign]

    def _listening(self, sequences: Sequence[RunningSequence]) -> SamplerOutput:
        for index, sequence in enumerate(sequences):
            self.of.setdefault(sequence.row, []).append(self._runner.logits[index].clone())
        return self._sample(sequences)
