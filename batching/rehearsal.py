"""Whether an engine gives a model's own answers: tried at start, because a list of models is never right.

The model's own answers are those of stock transformers to each prompt alone. They are computed before an engine takes
the model over. Worker thread only.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from batching.engine import Engine
from batching.errors import ModelError
from batching.stream import Row
from batching.types import Finish, PromptLogprob, Request, Sampling
from batching.worker import BatchSteps, NewTokens

LENGTHS = (5, 12)
"""Tokens of the prompts. They differ, so that padding or packing them together is part of what is tried."""

NUM_TOKENS = 4
"""Tokens generated after each, from a KV cache."""

TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}
"""By how much log probabilities may differ on average. Rounding alone gives a tenth of that; a model that is computed
wrongly is off by one and more."""


@dataclass(frozen=True)
class Answer:
    """To one prompt: the greedy `tokens`, their log probabilities, and those of the prompt's tokens but the first."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    prompt_logprobs: tuple[float, ...]


def prompts(model: PreTrainedModel) -> list[tuple[int, ...]]:
    """Arbitrary tokens, always the same for one vocabulary."""
    random, size = Random(0), model.config.get_text_config().vocab_size
    return [tuple(random.randrange(size) for _ in range(length)) for length in LENGTHS]


@torch.inference_mode()
def own_answers(model: PreTrainedModel) -> list[Answer]:
    """The model's answers, each to a prompt alone and computed without a KV cache.

    Raises ModelError if their log probabilities are not numbers, as where a model for bfloat16 overflows in float16.
    """
    answers = [_own_answer(model, prompt) for prompt in prompts(model)]
    if any(map(math.isnan, (logprob for answer in answers for logprob in (*answer.logprobs, *answer.prompt_logprobs)))):
        dtype = str(model.dtype).removeprefix("torch.")
        raise ModelError(f"the model computes no numbers in {dtype}: try another --dtype, or its weights are damaged")
    return answers


def _own_answer(model: PreTrainedModel, prompt: Sequence[int]) -> Answer:
    ids = list(prompt)
    for _ in range(NUM_TOKENS):
        logprobs = _logprobs(model, ids)
        ids.append(int(logprobs[-1].argmax()))
    chosen = logprobs.gather(1, torch.tensor(ids[1:], device=logprobs.device)[:, None])[:, 0].tolist()
    scored = len(prompt) - 1
    return Answer(tuple(ids[len(prompt) :]), tuple(chosen[scored:]), tuple(chosen[:scored]))


def _logprobs(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """[tokens, vocabulary], in float32."""
    with sdpa_kernel(SDPBackend.MATH):  # to load kernels of fused attention takes half a second
        logits: Tensor = model(torch.tensor([ids], device=model.device), use_cache=False).logits
    return logits[0].float().log_softmax(-1)


def disagreement(engine: Engine, model: PreTrainedModel, own: Sequence[Answer]) -> str | None:
    """How the engine's answers, all in one batch, differ from the model's own; None if they agree.

    Raises what the engine raises.
    """
    sampling = Sampling(max_tokens=NUM_TOKENS, seed=0, temperature=0.0, top_logprobs=0, prompt_logprobs=0)
    requests = [Request(str(place), prompt, sampling, time_limit=0.0) for place, prompt in enumerate(prompts(model))]
    rows = [Row(request, stream=None, arrived=0.0) for request in requests]  # type: ignore[arg-type]  # nobody reads
    given = Given()
    engine.run(rows, BatchSteps(given.take, rows, report_prompt=given.take_prompt))
    errors = [error for row, answer in zip(rows, own, strict=True) for error in _errors(given.of(row), answer)]
    mean = sum(errors) / len(errors)
    if mean <= _tolerance(model):
        return None
    return f"its log probabilities are off by {mean:.2g} on average"


def _tolerance(model: PreTrainedModel) -> float:
    """That of the coarsest numbers among the weights: quantised ones round what they are multiplied with, too, and so
    do layers that quantise their inputs, whatever their weights are kept as."""
    schemes = (getattr(each, "quantization_scheme", None) for each in model.modules())
    dtypes = {each.dtype for each in model.parameters()}
    if any(getattr(scheme, "input_activations", None) for scheme in schemes):
        dtypes.add(torch.int8)
    return max(TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]) for dtype in dtypes)


def _errors(given: Answer, own: Answer) -> list[float]:
    """Differences of log probabilities, up to the first token that differs: after it the texts are no longer the same.

    Of two tokens that are nearly as likely, rounding may choose either; the difference is then small, too.
    """
    pairs = list(zip(given.prompt_logprobs, own.prompt_logprobs, strict=True))
    for token, other, *logprobs in zip(given.tokens, own.tokens, given.logprobs, own.logprobs, strict=True):
        pairs.append((logprobs[0], logprobs[1]))
        if token != other:
            break
    return [abs(one - another) for one, another in pairs]


class Given:
    """What each row of a batch is given."""

    def __init__(self) -> None:
        self._tokens = defaultdict[Row, list[tuple[int, float]]](list)
        self._prompts = defaultdict[Row, list[float]](list)

    def of(self, row: Row) -> Answer:
        tokens, logprobs = zip(*self._tokens[row], strict=True)
        return Answer(tokens, logprobs, tuple(self._prompts[row]))

    def take(self, tokens: NewTokens, running: int) -> None:
        for row, token, _, logprob in tokens:
            if logprob is not None:
                self._tokens[row].append((token, logprob.logprob))

    def take_prompt(
        self, row: Row, logprobs: Sequence[PromptLogprob | None], finish: Finish | None, running: int
    ) -> None:
        self._prompts[row] += [entry.logprob for entry in logprobs if entry is not None]
