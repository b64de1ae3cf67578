"""Request bodies, as types that check them.

Exact about what would change the answer, liberal about the rest: null means the field is left out, an unknown field is
ignored and named in a response header, and a known field that cannot be honoured is a 400.
"""

import re
from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from server.fields import Body, Flag, Int64, Integral, NoEffect, Number, RequestBody, TokenId, Tokens
from server.openai.constraints import CONSTRAINING, Constraint, Constraints, ResponseFormat, constraints_of
from server.openai.messages import Messages, PromptEnd
from server.openai.tools import ToolUse

MAX_STOPS = 16  # OpenAI allows 4
MAX_CHOICES = 16
MAX_PROMPTS = 64
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
    include_usage: Flag | None = None
    """Send the usage in a final event of its own."""
    continuous_usage_stats: Flag | None = None
    """Send the usage so far in every event, as in vLLM; not for clients that add up usage across events."""


class TemplateOptions(Body):
    """The chat template variables that a request may set; `thinking` is an alias of `enable_thinking`."""

    enable_thinking: Flag | None = None
    thinking: Flag | None = None

    @model_validator(mode="before")
    @classmethod
    def _template_is_the_models(cls, value: object) -> object:
        if isinstance(value, dict) and any(value.get(name) is not None for name in ("chat_template", "tokenize")):
            raise ValueError("the model's chat template cannot be replaced")
        return value

    @property
    def thinks(self) -> bool | None:
        return self.thinking if self.enable_thinking is None else self.enable_thinking


class Thinking(Body):
    """As in Anthropic's API and the Go rewrite of RAGFlow. `budget_tokens` ends the thinking after that many."""

    type: Literal["enabled", "disabled", "adaptive", "auto"]
    budget_tokens: Tokens | None = None

    @property
    def thinks(self) -> bool | None:
        return {"enabled": True, "disabled": False}.get(self.type)


class ThinkingChoice(Body):
    """The fields that turn thinking on or off; request types inherit from this one."""

    enable_thinking: Flag | None = None
    chat_template_kwargs: TemplateOptions | None = None
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    """"none" and "minimal" turn thinking off, other values on."""

    @property
    def thinks(self) -> bool | None:
        """Whether the request turns thinking on or off, whichever field says so; None if none does."""
        if self.enable_thinking is not None:
            return self.enable_thinking
        for spelled in (self.chat_template_kwargs, self.thinking):
            if spelled is not None and spelled.thinks is not None:
                return spelled.thinks
        return None if self.reasoning_effort is None else self.reasoning_effort not in ("none", "minimal")


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
    """Strings that end the answer."""
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
    def _prompt_logprobs_not_streamed(self) -> Self:
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("the field prompt_logprobs may not be set when stream is true")
        return self

    @model_validator(mode="after")
    def _tokens_are_named_with_logprobs(self) -> Self:
        if self.logprob_token_ids and self.wanted_logprobs is None:
            raise ValueError("the field logprob_token_ids may only be set when logprobs is set")
        return self

    @model_validator(mode="after")
    def _one_constraint(self) -> Self:
        if len(found := self._constraints) > 1:
            names = " and ".join(each.param for each in found[:2])
            raise ValueError(f"the fields {names} each constrain the answer, so send only one of them")
        return self

    @cached_property
    def constraint(self) -> Constraint | None:
        """What the answer must match; None for anything."""
        return next(iter(self._constraints), None)

    @cached_property
    def _constraints(self) -> list[Constraint]:
        wanted = getattr(self, "response_format", None)
        return constraints_of(self, wanted) if self.model_fields_set & CONSTRAINING else []

    @property
    def wanted_tokens(self) -> int | None:
        """The requested answer length."""
        return self.max_tokens

    @property
    def useless_if_cut(self) -> bool:
        """Whether a program will parse the answer, so that a truncated one is useless."""
        return False

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


class ChatRequest(Generation, TokenReports, ThinkingChoice, ToolUse, PromptEnd):
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
        return bool(self.offered) or self.constraint is not None

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def skipped(self) -> tuple[str, ...]:
        return self.skipped_tools

    @property
    def budget(self) -> int | None:
        """Maximum number of thinking tokens, whichever field gives it."""
        spelled = self.thinking_budget or self.thinking_token_budget
        return spelled or (self.thinking.budget_tokens if self.thinking else None)


class CompletionRequest(Generation, TokenReports):
    """`POST /v1/completions`: one prompt or several, as text or token ids, each answered separately."""

    unsupported = UNSUPPORTED | {"messages", "tools", "functions", "max_completion_tokens", "continue_final_message"}

    prompt: Prompts
    """A text, token ids, or a list of either."""
    add_special_tokens: Flag | None = None
    """False: a text starts without what the tokenizer puts first, for prompts that already have it."""
    max_tokens: Annotated[int, Field(strict=True, ge=0), Integral] | None = None
    """As for chat; 0 needs `echo` and generates nothing."""
    response_format: ResponseFormat | None = None
    echo: Flag | None = None
    """Start the answer with the prompt, and `logprobs` with the prompt's tokens (null for the first)."""
    logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_TOP_LOGPROBS), Integral] | None = None
    best_of: Annotated[int, Field(strict=True, ge=1, le=MAX_CHOICES), Integral] | None = None
    """At most `n`, because every answer is returned."""

    @model_validator(mode="after")
    def _all_are_best(self) -> Self:
        if (self.best_of or 1) > (self.n or 1):
            raise ValueError("the field best_of may not be larger than n, because every answer is returned")
        return self

    @model_validator(mode="after")
    def _generates_or_echoes(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("the field max_tokens may only be 0 when echo is true")
        return self

    @property
    def useless_if_cut(self) -> bool:
        return self.constraint is not None

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    def prompt_logprobs_with(self, choice: int) -> int | None:
        """Each choice has its own. A row that generates nothing computes them whether or not they are wanted."""
        echoed = self.logprobs if self.echo else None
        counts = [wanted for wanted in (echoed, self.prompt_logprobs) if wanted is not None]
        return max(counts, default=0 if self.max_tokens == 0 else None)
