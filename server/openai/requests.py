"""What a client may ask for, as types that check it.

Exact about what would change the answer, liberal about the rest: a null is a field left out, a field that this service
does not know is ignored and named in the answer's headers, and one that it knows but cannot honour is a 400.
"""

import re
import secrets
from collections.abc import Iterable
from typing import Annotated, Literal, Self, TypeVar

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import from_json

from batching.types import Forced, Sampling
from server.fields import Body, Flag, Int64, Integral, NoEffect, Number, RequestBody, Schema, TokenId, Tokens
from server.http.errors import ApiError, bad_request
from server.model.served_model import ServedModel
from server.openai.messages import Messages
from server.openai.tools import ToolUse
from server.settings import WHOLE_ANSWER, Settings

MAX_STOPS = 16  # OpenAI allows 4
MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 1024
MAX_STOP_LENGTH = 256  # characters; each piece of an answer is searched for each stop string
GREEDY_BELOW = 0.01  # a smaller temperature only adds rounding noise to the choice of the largest logit

UNSUPPORTED = (
    frozenset(["audio", "web_search_options", "chat_template", "documents", "suffix", "prompt_embeds"])
    | frozenset(["continue_final_message", "truncate_prompt_tokens", "return_token_ids", "return_tokens_as_token_ids"])
    | frozenset(["structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"])
    | frozenset(["regex", "ebnf", "grammar", "json_schema", "bad_words", "allowed_token_ids", "use_beam_search"])
    | frozenset(["mirostat", "typical_p", "logits_processors"])
)
"""Fields of OpenAI's API and of other servers that would change the answer, and that this service does not have."""


class JsonSchema(Body):
    """`json_schema` of a response format.

    With `strict`, a schema that cannot be held to in every word is refused; else the rest is left to the model.
    """

    name: str | None = None
    """What the schema is called, which means nothing here."""
    description: str | None = None
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: Flag | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    """The schema itself, of either type, as llama.cpp has it."""

    @model_validator(mode="after")
    def _schema_if_named(self) -> Self:
        schemas = [schema for schema in (self.json_schema, self.schema_) if schema is not None]
        if self.type == "json_schema" and not schemas:
            raise ValueError("the type json_schema needs a json_schema")
        if len(schemas) > (self.type != "text") or (self.json_schema and self.type != "json_schema"):
            raise ValueError("a json_schema belongs to the type json_schema, which has one")
        return self


def _prompts(value: object) -> object:
    """One prompt or several, text or token ids -> a list of prompts."""
    single = isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int))
    return [value] if single else value


def _prompt(value: object, check: ValidatorFunctionWrapHandler) -> object:
    try:
        return check(value)
    except ValidationError:
        raise ValueError("a prompt must be a string or a list of token ids") from None


TextOrIds = Annotated[str, Field(strict=True)] | Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Prompt = Annotated[TextOrIds, WrapValidator(_prompt)]
PromptList = Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
Prompts = Annotated[PromptList, BeforeValidator(_prompts, json_schema_input_type=Prompt | PromptList)]


class StreamOptions(Body):
    include_usage: Flag = False
    """Counts in one event of their own, the last."""
    continuous_usage_stats: Flag = False
    """Counts so far in every event, as vLLM has it; not for clients that add up what events say."""


class TemplateOptions(Body):
    """The only variables of a chat template that a request may set; `thinking` is the same under another name."""

    enable_thinking: Flag | None = None
    thinking: Flag | None = None

    @model_validator(mode="before")
    @classmethod
    def _template_is_the_models(cls, value: object) -> object:
        if isinstance(value, dict) and any(value.get(name) is not None for name in ("chat_template", "tokenize")):
            raise ValueError("the chat template is the model's own and cannot be replaced")
        return value

    @property
    def thinks(self) -> bool | None:
        return self.thinking if self.enable_thinking is None else self.enable_thinking


class Thinking(Body):
    """As Anthropic's API and the Go rewrite of RAGFlow have it. `budget_tokens` ends the thinking after that many."""

    type: Literal["enabled", "disabled", "adaptive", "auto"]
    budget_tokens: Tokens | None = None

    @property
    def thinks(self) -> bool | None:
        return {"enabled": True, "disabled": False}.get(self.type)


def _stops(value: object) -> object:
    return [value] if isinstance(value, str) else value


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
StopList = Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)]
Stops = Annotated[StopList, BeforeValidator(_stops, json_schema_input_type=Stop | StopList)]


def _biases(value: object) -> object:
    """Token ids are keys, hence strings, in JSON."""
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


class Generation(RequestBody):
    """What every request for generated text may say of the tokens it wants."""

    unsupported = UNSUPPORTED

    stream: Flag | None = None
    """Whether the answer comes as server-sent events, the last one being `[DONE]`."""
    stream_options: StreamOptions | None = None
    """Means something with `stream` only."""
    n: Annotated[int, Field(strict=True, ge=1, le=MAX_CHOICES), Integral] | None = None
    """How many answers to each prompt."""
    max_tokens: Tokens | None = None
    """The answer's greatest length; the service's default if left out, and cut to what fits."""
    min_tokens: Annotated[int, Field(strict=True, ge=0), Integral] | None = None
    """No stop token is chosen before."""
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    """Below 0.01 the likeliest token is taken."""
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    """At 0 the likeliest token is taken."""
    top_k: Annotated[int, Field(strict=True, ge=-1, lt=2**31), Integral] | None = None
    """0 and -1: no limit."""
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    logit_bias: Biases | None = None
    """By token id, what is added to the token's score."""
    seed: Int64 | None = None
    """Choice i is drawn with the seed + i, so each can be had again alone; random if left out."""
    stop: Stops | None = None
    """Strings before which an answer ends."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True)] | None = None
    include_stop_str_in_output: Flag | None = None
    """Whether the stop string that was found ends the text."""
    ignore_eos: Flag | None = None
    """Whether to go on past the model's own end tokens."""
    do_sample: Flag | None = None
    """False: the likeliest token is taken."""
    priority: Annotated[int, Field(strict=True, ge=-8, le=8), Integral] | None = None
    """Lower is sooner, among the requests of the same API key."""
    prompt_logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_TOP_LOGPROBS), Integral] | None = None
    """How many likeliest tokens to tell beside each token of the prompt, and its own log probability. Not streamed."""
    skip_special_tokens: Literal[True] | None = None
    """As it is here in any case."""
    add_generation_prompt: Literal[True] | None = None
    """As it is here in any case."""
    # They say who asks, how an account is billed, or what would be quicker or shown elsewhere: not what is wanted.
    user: NoEffect = None
    metadata: NoEffect = None
    store: NoEffect = None
    service_tier: NoEffect = None
    safety_identifier: NoEffect = None
    prompt_cache_key: NoEffect = None
    prompt_cache_retention: NoEffect = None
    prediction: NoEffect = None
    verbosity: NoEffect = None
    include_reasoning: NoEffect = None
    separate_reasoning: NoEffect = None
    spaces_between_special_tokens: NoEffect = None
    cache_control: NoEffect = None
    extra_content: NoEffect = None
    extra_body: NoEffect = None
    drop_params: NoEffect = None

    @model_validator(mode="after")
    def _prompt_is_told_whole(self) -> Self:
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("the field prompt_logprobs may not be set when stream is true")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        """The answer's length that was asked for."""
        return self.max_tokens

    @property
    def useless_if_cut(self) -> bool:
        """Whether a program reads the answer, so that one that is cut is as good as none."""
        return False

    @property
    def wanted_logprobs(self) -> int | None:
        """How many likeliest tokens to tell at each place; None for no log probabilities at all."""
        return None

    def prompt_logprobs_with(self, choice: int) -> int | None:
        """The same for the places of the prompt. They are told once, with the first choice."""
        return self.prompt_logprobs if choice == 0 else None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream and self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def greedy(self) -> bool:
        low = self.temperature is not None and self.temperature < GREEDY_BELOW
        return low or self.top_p == 0 or self.do_sample is False


class ChatRequest(Generation, ToolUse):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: Tokens | None = None
    """`max_tokens` under its newer name, which wins."""
    logprobs: Flag | None = None
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_TOP_LOGPROBS), Integral] | None = None
    """Needs `logprobs`, unless it is 0."""
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=8, fail_fast=True)] | None = None
    enable_thinking: Flag | None = None
    chat_template_kwargs: TemplateOptions | None = None
    thinking: Thinking | None = None
    thinking_budget: Tokens | None = None
    """Tokens after which thinking is ended."""
    thinking_token_budget: Tokens | None = None
    """The same, as vLLM calls it."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    """"none" and "minimal" turn thinking off, the others on."""

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("the field top_logprobs may only be set when logprobs is true")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        """The newer name wins."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def useless_if_cut(self) -> bool:
        return bool(self.offered) or (self.response_format is not None and self.response_format.type != "text")

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def skipped(self) -> tuple[str, ...]:
        return self.skipped_tools

    @property
    def budget(self) -> int | None:
        """Tokens after which thinking must end, in any spelling."""
        spelled = self.thinking_budget or self.thinking_token_budget
        return spelled or (self.thinking.budget_tokens if self.thinking else None)

    @property
    def thinks(self) -> bool | None:
        """Whether the request turns thinking on or off, in any of its spellings; None if in none."""
        if self.enable_thinking is not None:
            return self.enable_thinking
        for spelled in (self.chat_template_kwargs, self.thinking):
            if spelled is not None and spelled.thinks is not None:
                return spelled.thinks
        return None if self.reasoning_effort is None else self.reasoning_effort not in ("none", "minimal")


class CompletionRequest(Generation):
    """`POST /v1/completions`: a prompt as text or token ids, or several, each with an answer of its own."""

    unsupported = UNSUPPORTED | {"messages", "tools", "functions", "response_format", "max_completion_tokens"}

    prompt: Prompts
    """A text, token ids, or a list of either."""
    max_tokens: Annotated[int, Field(strict=True, ge=0), Integral] | None = None
    """The same; 0 needs `echo`, and then nothing is generated."""
    echo: Flag | None = None
    """Whether the answer begins with the prompt, and `logprobs` with those of its tokens (null for the first)."""
    logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_TOP_LOGPROBS), Integral] | None = None
    best_of: Annotated[int, Field(strict=True, ge=1, le=MAX_CHOICES), Integral] | None = None
    """As many as `n`: there are no others to choose from."""

    @model_validator(mode="after")
    def _all_are_best(self) -> Self:
        if (self.best_of or 1) > (self.n or 1):
            raise ValueError("the field best_of may not be larger than n, because every answer is returned")
        return self

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("the field max_tokens may only be 0 when echo is true")
        return self

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    def prompt_logprobs_with(self, choice: int) -> int | None:
        """Each choice has its own. A row that generates nothing is there for these alone, wanted or not."""
        echoed = self.logprobs if self.echo else None
        asked = [wanted for wanted in (echoed, self.prompt_logprobs) if wanted is not None]
        return max(asked, default=0 if self.max_tokens == 0 else None)


class TokenizeRequest(RequestBody):
    """`POST /tokenize`: a text, or a conversation as the model would see it."""

    unsupported = UNSUPPORTED

    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: Flag | None = None
    """Whether to add what the tokenizer puts around a text, its first token for instance; by default to a prompt and
    not to messages, which have it from the chat template."""
    return_token_strs: Flag = False
    """Whether to answer with the text of each token, too."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("one of the fields prompt and messages must be given")
        return self


class DetokenizeRequest(RequestBody):
    """`POST /detokenize`."""

    tokens: Annotated[list[TokenId], Field(max_length=1_000_000, fail_fast=True)]


Asked = TypeVar("Asked", bound=RequestBody)


def parse(kind: type[Asked], body: bytes, *, refuse_unknown: bool = False) -> Asked:
    """The request of this kind in a body of JSON.

    Raises `ApiError` 400 that names the first field at fault: one of a wrong value, one that would change the answer
    and is not supported, or with `refuse_unknown` one that is not known.
    """
    fields = _decode(body)
    for name in sorted(kind.unsupported):
        if fields.get(name):
            raise unsupported(name)
    ignored = tuple(key for key, value in fields.items() if key not in kind.model_fields and value is not None)
    if ignored and refuse_unknown:
        raise unsupported(ignored[0])
    try:
        asked = kind.model_validate(fields)
    except ValidationError as error:
        raise explain(error) from None
    asked.note(len(body), ignored)
    if asked.ignored and refuse_unknown:
        raise unsupported(asked.ignored[0])
    return asked


MAX_PARTS, MAX_ITEMS = 100_000, 1_000_000
"""Objects, lists and members of a body, and values in them. Parsing more would keep the interpreter from other threads
for a tenth of a second."""

MAX_STRINGS = 250_000
"""So many strings are told from what is around them; a body with more is taken for structure from there on."""


def _decode(body: bytes) -> dict[str, object]:
    if _has_too_many_parts(body):
        raise bad_request(
            f"The body has more than {MAX_PARTS:,} objects, lists and members, or {MAX_ITEMS:,} values.",
            code="too_large",
        )
    try:
        fields = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise bad_request(
            f"The body is not valid JSON: {str(error).split(' at line')[0]}.", code="invalid_json"
        ) from None
    if not isinstance(fields, dict):
        raise bad_request("The body must be a JSON object.")
    return fields


def _has_too_many_parts(body: bytes) -> bool:
    return len(body) > MAX_PARTS and _exceeds(body) and _exceeds(structure(body))


def _exceeds(text: bytes) -> bool:
    """Objects, lists and members are told by their brackets and colons, values by their commas."""
    return sum(map(text.count, b"{[:")) > MAX_PARTS or text.count(b",") > MAX_ITEMS


def structure(body: bytes) -> bytes:
    """JSON without its strings, in which code and tables have brackets, colons and commas of their own.

    In a few calls that each take milliseconds. What is not JSON is parsed up to its fault, and up to there this holds.
    """
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"")
    return b"".join(unescaped.split(b'"', 2 * MAX_STRINGS)[::2])


def unsupported(name: str) -> ApiError:
    """A field's own name is repeated only where it is fit for a log and a terminal."""
    shown = name if re.fullmatch(r"[\w.]{1,80}", name, re.ASCII) else None
    return bad_request(f"The field {shown or 'of that name'} is not supported.", shown, "unsupported_field")


def explain(error: ValidationError) -> ApiError:
    """One sentence about the first thing that is wrong. Never repeats a value that was sent."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    message = first["msg"].removeprefix("Value error, ").removesuffix(".")
    param = ".".join(map(str, first["loc"]))
    if not param:
        return bad_request(f"{message[:1].upper()}{message[1:]}.")
    return bad_request(f"{param}: {message[:1].lower()}{message[1:]}.", param)


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
