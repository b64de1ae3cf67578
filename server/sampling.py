"""From what a request says of its tokens to `Sampling`, with this service's defaults and limits."""

import secrets
from collections.abc import Iterable
from typing import TypeVar

from batching.types import Forced, Sampling
from server.errors import bad_request
from server.schema import GREEDY_BELOW, Generation
from server.served_model import ServedModel
from server.settings import WHOLE_ANSWER, Settings

Value = TypeVar("Value", int, float)


def sampling(
    model: ServedModel, asked: Generation, room: int, *, choice: int = 0, forced: Forced | None = None
) -> Sampling:
    """The sampling of one choice of a request that has room for `room` tokens; what it leaves open is the service's.

    A length that does not fit is cut to what does. Choice i of a seeded request has the seed + i, so that each can be
    had again alone. Raises `ApiError` 400 for a token id that the model does not have.
    """
    wanted = length(model.settings, asked, room)
    vocab_size = model.info.vocab_size
    _check_ids(asked.logit_bias or (), vocab_size, "logit_bias")
    _check_ids(asked.stop_token_ids or (), vocab_size, "stop_token_ids")
    defaults = model.defaults
    temperature, top_p = _or(asked.temperature, defaults.temperature), _or(asked.top_p, defaults.top_p)
    greedy = asked.greedy or temperature < GREEDY_BELOW or top_p == 0
    ends = frozenset() if asked.ignore_eos else model.stop_token_ids
    return Sampling(
        max_tokens=wanted,
        seed=secrets.randbits(63) if asked.seed is None else _wrapped(asked.seed + choice),
        temperature=0.0 if greedy else temperature,
        top_p=top_p,
        top_k=max(_or(asked.top_k, defaults.top_k), 0),
        min_p=_or(asked.min_p, defaults.min_p),
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        repetition_penalty=_or(asked.repetition_penalty, defaults.repetition_penalty),
        stop_token_ids=ends | frozenset(asked.stop_token_ids or ()),
        min_tokens=min(asked.min_tokens or 0, wanted),
        logit_bias=tuple((asked.logit_bias or {}).items()),
        top_logprobs=asked.wanted_logprobs,
        prompt_logprobs=asked.prompt_logprobs_with(choice),
        forced=forced,
    )


def length(settings: Settings, asked: Generation, room: int) -> int:
    """The most tokens of an answer to a request that has room for `room` of them."""
    default = settings.default_max_tokens or room
    if asked.useless_if_cut:
        default = max(default, WHOLE_ANSWER)
    return min(_or(asked.wanted_tokens, default), settings.max_output_tokens, room)


def _or(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def _wrapped(seed: int) -> int:
    """The signed 64-bit number with the same low bits."""
    return (seed + 2**63) % 2**64 - 2**63


def _check_ids(ids: Iterable[int], vocab_size: int, param: str) -> None:
    if any(token >= vocab_size for token in ids):
        raise bad_request("A token id is beyond the model's vocabulary.", param)
