"""From a request's numbers, the model's defaults and the operator's limits to `Sampling`."""

import secrets
from collections.abc import Iterable
from typing import TypeVar

from batching.types import Forced, Sampling
from server.http.errors import bad_request
from server.model.served_model import ServedModel
from server.model.text import Text
from server.openai.requests import Generation
from server.settings import WHOLE_ANSWER, Settings

GREEDY_BELOW = 0.01
"""A lower temperature only adds rounding noise to argmax."""

Value = TypeVar("Value", int, float)


def sampling(
    model: ServedModel, body: Generation, room: int, *, choice: int = 0, forced: Forced | None = None
) -> Sampling:
    """Sampling parameters of one choice, with `room` tokens left; unset fields take the service's defaults.

    A length that does not fit is reduced. Choice i of a seeded request uses seed + i, so that each can be reproduced
    alone. Raises `ApiError` 400 for a token id outside the model's vocabulary.
    """
    wanted = length(model.settings, body, room)
    vocab_size = model.info.vocab_size
    _check_ids(body.logit_bias or (), vocab_size, "logit_bias")
    _check_ids(body.stop_token_ids or (), vocab_size, "stop_token_ids")
    _check_ids(body.logprob_token_ids or (), vocab_size, "logprob_token_ids")
    defaults = model.defaults
    temperature, top_p = _or(body.temperature, defaults.temperature), _or(body.top_p, defaults.top_p)
    greedy = body.do_sample is False or temperature < GREEDY_BELOW or top_p == 0
    ends = frozenset() if body.ignore_eos else model.stop_token_ids
    return Sampling(
        max_tokens=wanted,
        seed=secrets.randbits(63) if body.seed is None else _wrapped(body.seed + choice),
        temperature=0.0 if greedy else temperature,
        top_p=top_p,
        top_k=max(_or(body.top_k, defaults.top_k), 0),
        min_p=_or(body.min_p, defaults.min_p),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=_or(body.repetition_penalty, defaults.repetition_penalty),
        stop_token_ids=ends | frozenset(body.stop_token_ids or ()),
        min_tokens=min(body.min_tokens or 0, wanted),
        logit_bias=tuple((body.logit_bias or {}).items()),
        top_logprobs=body.wanted_logprobs,
        logprob_token_ids=tuple(body.logprob_token_ids or ()),
        prompt_logprobs=body.prompt_logprobs_with(choice),
        forced=forced,
    )


def truncated(model: ServedModel, body: Generation, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """The end of the prompt, as long as the request says."""
    most = body.truncate_prompt_tokens
    if most is None:
        return prompt
    if most < 0:
        window = model.info.context_window
        most = window - min(length(model.settings, body, window - 1), window - 1)
    if most == 0:
        raise bad_request("A prompt must have at least one token.", "truncate_prompt_tokens")
    return prompt[-most:]


def stop_tokens(text: Text, body: Generation) -> frozenset[int]:
    """The tokens that are reported as stop reasons: not the end of the model's own answers, unless that is ignored."""
    ends = frozenset() if body.ignore_eos else text.stop_token_ids
    return frozenset(body.stop_token_ids or ()) - ends


def length(settings: Settings, body: Generation, room: int) -> int:
    """The maximum length of an answer with `room` tokens left."""
    default = settings.default_max_tokens or room
    if body.useless_if_cut:
        default = max(default, WHOLE_ANSWER)
    return min(_or(body.wanted_tokens, default), settings.max_output_tokens, room)


def _or(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def _wrapped(seed: int) -> int:
    """The signed 64-bit number with the same low bits."""
    return (seed + 2**63) % 2**64 - 2**63


def _check_ids(ids: Iterable[int], vocab_size: int, param: str) -> None:
    if any(token >= vocab_size for token in ids):
        raise bad_request("A token id is beyond the model's vocabulary.", param)
