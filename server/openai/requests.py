"""Request bodies, as types that check them, and what they ask of the model, as `Sampling`.

Exact about what would change the answer, liberal about the rest: null means the field is left out, an unknown field is
ignored and named in a response header, and a known field that cannot be honoured is a 400.
"""

import re
import secrets
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from batching.types import Forced, Sampling
from server.fields import Body, Flag, Int64, Integral, NoEffect, Number, RequestBody, TokenId, Tokens, explain
from server.http.errors import bad_request, thousands
from server.model.served_model import ServedModel
from server.model.text import Text
from server.openai.constraints import CONSTRAINING, Constraint, Constraints, ResponseFormat, constraints_of
from server.openai.messages import Dialogue, Messages
from server.settings import WHOLE_ANSWER, Settings

MAX_STOPS = 16  # OpenAI allows 4
MAX_CHOICES = 16
MAX_PREDICTED_PARTS = 256
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 1024
MAX_STOP_LENGTH = 256  # characters; every piece of an answer is searched for every stop string

UNSUPPORTED = (
    frozenset(["audio", "web_search_options", "chat_template", "documents", "suffix", "prompt_embeds"])
    | frozenset(
        [
            "token_ids_logprob",
            "structural_tag",
            "guided_whitespace_pattern",
            "bad_words",
            "allowed_token_ids",
            "use_beam_search",
        ]
    )
    | frozenset(["mirostat", "typical_p", "logits_processors"])
)
"""Fields of OpenAI's API and of other servers that would change the answer and are not implemented here."""


class StreamOptions(Body):
    include_usage: Flag | None = None
    """Send the usage in a final event of its own."""
    continuous_usage_stats: Flag | None = None
    """Send the usage so far in every event, as in vLLM; not for clients that add up usage across events."""


def _stops(value: object) -> object:
    return [value] if isinstance(value, str) else value


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
StopList = Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)]
Stops = Annotated[StopList, BeforeValidator(_stops, json_schema_input_type=Stop | StopList)]


def _biases(value: object) -> object:
    """Token ids are JSON keys, so they arrive as strings."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_BIASES:
        raise ValueError(f"at most {MAX_BIASES} tokens may have a bias")
    if not all(isinstance(token, str) and re.fullmatch(r"[0-9]{1,9}", token, re.ASCII) for token in value):
        raise ValueError("the keys must be token ids")
    return {int(token): bias for token, bias in value.items()}


Bias = Annotated[Number, Field(ge=-100, le=100)]
Biases = Annotated[
    dict[int, Bias],
    Field(max_length=MAX_BIASES, json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,9}$"}}),
    BeforeValidator(_biases),
]


class Generation(RequestBody, Constraints):
    """The fields shared by all requests that generate text."""

    unsupported = UNSUPPORTED

    stream: Flag | None = None
    """Send the answer as server-sent events, ending with `[DONE]`."""
    stream_options: StreamOptions | None = None
    """Only used with `stream`."""
    n: Annotated[int, Field(strict=True, ge=1, le=MAX_CHOICES), Integral] | None = None
    """Number of choices for each prompt."""
    max_tokens: Tokens | None = None
    """Maximum length of the answer; defaults to the service's setting and is cut to what fits."""
    min_tokens: Annotated[int, Field(strict=True, ge=0), Integral] | None = None
    """Suppress stop tokens until the answer has this many tokens."""
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    """Below 0.01, decoding is greedy."""
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    """At 0, decoding is greedy."""
    top_k: Annotated[int, Field(strict=True, ge=-1, lt=2**31), Integral] | None = None
    """0 and -1: no limit."""
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    logit_bias: Biases | None = None
    """Added to the logits of the given token ids."""
    seed: Int64 | None = None
    """Choice i uses seed + i, so each choice can be reproduced alone; random if left out."""
    stop: Stops | None = None
    """Strings that end the answer. They are not looked for in a thought, unless one holds its closing tag."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True)] | None = None
    include_stop_str_in_output: Flag | None = None
    """Keep the matched stop string at the end of the text."""
    ignore_eos: Flag | None = None
    """Continue past the model's end-of-sequence tokens."""
    do_sample: Flag | None = None
    """False: greedy decoding."""
    priority: Annotated[int, Field(strict=True, ge=-8, le=8), Integral] | None = None
    """Lower runs sooner, among requests of the same API key."""
    prompt_logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_TOP_LOGPROBS), Integral] | None = None
    """Return each prompt token's log probability and this many likeliest tokens. Cannot be streamed."""
    logprob_token_ids: Annotated[list[TokenId], Field(max_length=MAX_TOP_LOGPROBS, fail_fast=True)] | None = None
    """With `logprobs`: also return the log probabilities of these tokens, after the likeliest ones."""
    truncate_prompt_tokens: Annotated[int, Field(strict=True, ge=-1), Integral] | None = None
    """Keep only this many tokens from the prompt's end; -1: as many as leave room for the answer."""
    skip_special_tokens: Literal[True] | None = None
    """Always on; accepted for compatibility."""
    # These concern the user, billing, speed or display elsewhere, not the answer.
    user: NoEffect = None
    metadata: NoEffect = None
    store: NoEffect = None
    service_tier: NoEffect = None
    safety_identifier: NoEffect = None
    prompt_cache_key: NoEffect = None
    prompt_cache_retention: NoEffect = None
    verbosity: NoEffect = None
    include_reasoning: NoEffect = None
    separate_reasoning: NoEffect = None
    spaces_between_special_tokens: NoEffect = None
    cache_control: NoEffect = None
    extra_content: NoEffect = None
    extra_body: NoEffect = None
    drop_params: NoEffect = None

    @model_validator(mode="after")
    def _wishes_agree(self) -> Self:
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("the field prompt_logprobs may not be set when stream is true")
        if self.logprob_token_ids and self.wanted_logprobs is None:
            raise ValueError("the field logprob_token_ids may only be set when logprobs is set")
        _ = self.constraint  # raises for several
        return self

    @cached_property
    def constraint(self) -> Constraint | None:
        """What the answer must match; None for anything. Raises ValueError for several."""
        if not self.model_fields_set & CONSTRAINING:
            return None
        found = constraints_of(self, getattr(self, "response_format", None))
        if len(found) > 1:
            names = " and ".join(each.param for each in found[:2])
            raise ValueError(f"the fields {names} each constrain the answer, so send only one of them")
        return next(iter(found), None)

    @property
    def wanted_tokens(self) -> int | None:
        """The requested answer length."""
        return self.max_tokens

    @property
    def useless_if_cut(self) -> bool:
        """Whether a program will parse the answer, so that a truncated one is useless."""
        return self.constraint is not None

    @property
    def wanted_logprobs(self) -> int | None:
        """Number of likeliest tokens to return at each position; None for no log probabilities at all."""
        return None

    def prompt_logprobs_with(self, choice: int) -> int | None:
        """The same for the prompt's positions, which are returned once, with the first choice."""
        return self.prompt_logprobs if choice == 0 else None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream and self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class PredictedPart(Body):
    type: Literal["text"]
    text: str


class Prediction(Body):
    """OpenAI's predicted output."""

    type: Literal["content"]
    content: str | Annotated[list[PredictedPart], Field(max_length=MAX_PREDICTED_PARTS, fail_fast=True)]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TokenReports(Body):
    """Fields about tokens in replies made of choices."""

    return_token_ids: Flag | None = None
    """Return the ids of the prompt's and the generated tokens."""
    return_tokens_as_token_ids: Flag | None = None
    """Name tokens in `logprobs` by their ids, as `token_id:7`."""


class ChatRequest(Generation, TokenReports, Dialogue):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: Tokens | None = None
    """The newer name of `max_tokens`; it takes precedence."""
    logprobs: Flag | None = None
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_TOP_LOGPROBS), Integral] | None = None
    """Requires `logprobs`, unless it is 0."""
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=8, fail_fast=True)] | None = None
    thinking_budget: Tokens | None = None
    """Maximum number of thinking tokens."""
    thinking_token_budget: Tokens | None = None
    """vLLM's name for `thinking_budget`."""
    prediction: Prediction | None = None
    """A text that the answer is expected to repeat in part. It changes no answer; what is repeated takes less time."""
    echo: Flag | None = None
    """With `continue_final_message`: start the answer with the text that it continues."""

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.echo and not self.continue_final_message:
            raise ValueError("the field echo may only be set when continue_final_message is true")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("the field top_logprobs may only be set when logprobs is true")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        """The newer name takes precedence."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def useless_if_cut(self) -> bool:
        return bool(self.offered) or super().useless_if_cut

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def budget(self) -> int | None:
        """Maximum number of thinking tokens, whichever field gives it."""
        spelled = self.thinking_budget or self.thinking_token_budget
        return spelled or (self.thinking.budget_tokens if self.thinking else None)


def chat_of(request: Generation, fields: dict[str, Any], kind: type[ChatRequest] = ChatRequest) -> ChatRequest:
    """A request of another API as a chat with these `fields`. The others that both have mean the same.

    Raises `ApiError` 400.
    """
    same = ChatRequest.model_fields.keys() & type(request).model_fields.keys() - fields.keys()
    biases = {str(token): bias for token, bias in (request.logit_bias or {}).items()}
    try:
        return kind(**{name: getattr(request, name) for name in same} | {"logit_bias": biases} | fields)
    except ValidationError as error:
        raise explain(error) from None


GREEDY_BELOW = 0.01
"""A lower temperature only adds rounding noise to argmax."""

Value = TypeVar("Value", int, float)


def check_prompt(model: ServedModel, tokens: Sequence[int], param: str) -> None:
    """Raises `ApiError` 400 for a prompt that would fail its batch: one of no tokens, or with one that only the
    tokenizer has. `param` is the prompt's field."""
    if not tokens:
        raise bad_request("A prompt must have at least one token.", param)
    if max(tokens) >= model.info.vocab_size:
        raise bad_request("The prompt has a token id beyond the model's vocabulary.", param)


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


class Row(NamedTuple):
    """One row's prompt and how to sample from it; `prediction` is what the client expects of the answer."""

    prompt: tuple[int, ...]
    sampling: Sampling
    prediction: tuple[int, ...] = ()


def rows_of(
    model: ServedModel,
    body: Generation,
    prompt: tuple[int, ...],
    param: str,
    forced: Forced | None = None,
    prediction: tuple[int, ...] = (),
) -> list[Row]:
    """A row for each choice of a prompt, which came in the field `param`. Unset fields take the service's defaults.

    A length that does not fit is reduced. Choice i of a seeded request uses seed + i, so that each can be reproduced
    alone. Raises `ApiError` 400 for a token id outside the model's vocabulary, or if nothing fits after the prompt.
    """
    room = room_after(model, prompt, param, least=0 if body.wanted_tokens == 0 else 1)
    for name in ("logit_bias", "stop_token_ids", "logprob_token_ids"):
        if any(token >= model.info.vocab_size for token in getattr(body, name) or ()):
            raise bad_request("A token id is beyond the model's vocabulary.", name)
    wanted = length(model.settings, body, room)
    defaults = model.defaults
    temperature, top_p = _or(body.temperature, defaults.temperature), _or(body.top_p, defaults.top_p)
    greedy = body.do_sample is False or temperature < GREEDY_BELOW or top_p == 0
    ends = frozenset() if body.ignore_eos else model.stop_token_ids
    samplings = (
        Sampling(
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
        for choice in range(body.n or 1)
    )
    return [Row(prompt, sampling, prediction[:room]) for sampling in samplings]


def room_after(model: ServedModel, prompt: Sequence[int], param: str, *, least: int) -> int:
    """Number of tokens that can follow the prompt. Raises `ApiError` 400 if there are fewer than `least`."""
    room = model.info.context_window - len(prompt)
    if room < least:
        raise bad_request(
            f"The prompt has {thousands(len(prompt))} tokens, but prompt and answer together must fit in the "
            f"context window of {thousands(model.info.context_window)}; shorten the prompt.",
            param,
            "context_length_exceeded",
        )
    return room


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
