"""What a client may send, as types that check it. A field that is not here is refused by name, never ignored."""

import re
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from server.errors import ApiError, bad_request
from server.tools import Flag, ToolTurn, ToolUse

MAX_STOPS = 16  # OpenAI allows 4
MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_MESSAGES = 2048
MAX_TOP_LOGPROBS = 20
MAX_STOP_LENGTH = 256  # characters; each piece of an answer is searched for each stop string
GREEDY_BELOW = 0.01  # a smaller temperature only adds rounding noise to the choice of the largest logit

Int64 = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]
Tokens = Annotated[int, Field(strict=True, ge=1)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class Body(BaseModel):
    """The strings below fields are what /openapi.json says of them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _text(content: Any) -> Any:
    """Content as one string: text parts are joined, no content is empty, anything else is refused by its type."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return content
    return "".join(map(_part, content))


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else None
        known = kind if isinstance(kind, str) and re.fullmatch(r"[a-z_]{1,30}", kind) else "other"
        raise ValueError(f"this model reads text only, but a part of type {known} was sent")
    if not isinstance(part.get("text"), str):
        raise ValueError("a text part needs a string in its field text")
    return str(part["text"])


class TextPart(BaseModel):
    """What a part must have, for /openapi.json; other keys of it are not looked at."""

    type: Literal["text"]
    text: str


Content = Annotated[str, BeforeValidator(_text, json_schema_input_type=str | list[str | TextPart] | None)]


class JsonSchema(Body):
    """`json_schema` of a response format. `strict` is what this service does in any case."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: Flag | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_if_named(self) -> Self:
        if (self.json_schema is None) == (self.type == "json_schema"):
            raise ValueError("the type json_schema needs a json_schema, and no other type has one")
        return self


def _prompts(value: Any) -> Any:
    """One prompt or several, text or token ids -> a list of prompts."""
    single = isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int))
    return [value] if single else value


def _prompt(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    try:
        return check(value)
    except ValidationError:
        raise ValueError("a prompt must be a string or a list of token ids") from None


TextOrIds = Annotated[str, Field(strict=True)] | Annotated[list[TokenId], Field(min_length=1)]
Prompt = Annotated[TextOrIds, WrapValidator(_prompt)]
PromptList = Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS)]
Prompts = Annotated[PromptList, BeforeValidator(_prompts, json_schema_input_type=Prompt | PromptList)]


class Message(ToolTurn):
    """One turn. Templates may use `name`; the last four are what clients send back of an answer of ours."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = ""
    name: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None

    def for_template(self) -> dict[str, Any]:
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self.content} | self.tool_fields()
        if self.name:
            message["name"] = self.name
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        return message


class StreamOptions(Body):
    include_usage: Flag = False
    """Counts in one event of their own, the last."""
    continuous_usage_stats: Flag = False
    """Counts so far in every event, as vLLM has it; not for clients that add up what events say."""


class TemplateOptions(Body):
    """The only variables of a chat template that a request may set."""

    enable_thinking: Flag | None = None


class Thinking(Body):
    """As the Go rewrite of RAGFlow sends it. `budget_tokens` ends the thinking after so many tokens."""

    type: Literal["enabled", "disabled"]
    budget_tokens: Tokens | None = None


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
StopList = Annotated[list[Stop], Field(max_length=MAX_STOPS)]
Stops = Annotated[StopList, BeforeValidator(_stops, json_schema_input_type=Stop | StopList)]


def _biases(value: Any) -> Any:
    """Token ids are keys, hence strings, in JSON."""
    if not isinstance(value, dict):
        return value
    if not all(isinstance(token, str) and re.fullmatch(r"[0-9]{1,9}", token, re.ASCII) for token in value):
        raise ValueError("the keys must be token ids")
    return {int(token): bias for token, bias in value.items()}


Bias = Annotated[Number, Field(ge=-100, le=100)]
Biases = Annotated[
    dict[int, Bias],
    Field(max_length=1024, json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,9}$"}}),
    BeforeValidator(_biases),
]


class Generation(Body):
    """What every request for generated text may say of the tokens it wants."""

    model: str | None = None
    stream: Flag | None = None
    """Whether the answer comes as server-sent events, the last one being `[DONE]`."""
    stream_options: StreamOptions | None = None
    """Needs `stream`."""
    n: Annotated[int, Field(strict=True, ge=1, le=MAX_CHOICES)] | None = None
    """How many answers to each prompt."""
    max_tokens: Tokens | None = None
    """The answer's greatest length; the service's default if left out, and cut to what fits."""
    min_tokens: Annotated[int, Field(strict=True, ge=0)] | None = None
    """No stop token is chosen before."""
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    """Below 0.01 the likeliest token is taken."""
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    """At 0 the likeliest token is taken."""
    top_k: Annotated[int, Field(strict=True, ge=-1, lt=2**31)] | None = None
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
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    include_stop_str_in_output: Flag | None = None
    """Whether the stop string that was found ends the text."""
    ignore_eos: Flag | None = None
    """Whether to go on past the model's own end tokens."""
    do_sample: Flag | None = None
    """False: the likeliest token is taken."""
    priority: Annotated[int, Field(strict=True, ge=-8, le=8)] | None = None
    """Lower is sooner: each step down doubles the request's share of the device."""
    # They say who asks or how an account is billed, not what is wanted.
    user: str | None = None
    """Accepted and without effect."""
    metadata: dict[str, str] | None = None
    """Accepted and without effect."""
    store: Flag | None = None
    """Accepted and without effect."""
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    """Accepted and without effect."""
    safety_identifier: str | None = None
    """Accepted and without effect."""
    prompt_cache_key: str | None = None
    """Accepted and without effect."""

    @model_validator(mode="after")
    def _usage_is_for_streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("the field stream_options may only be set when stream is true")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        """The answer's length that was asked for."""
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many likeliest tokens to tell at each place; None for no log probabilities at all."""
        return None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def greedy(self) -> bool:
        low = self.temperature is not None and self.temperature < GREEDY_BELOW
        return low or self.top_p == 0 or self.do_sample is False


class ChatRequest(Generation, ToolUse):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Tokens | None = None
    """`max_tokens` under its newer name, which wins."""
    logprobs: Flag | None = None
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """Needs `logprobs`."""
    response_format: ResponseFormat | None = None
    parallel_tool_calls: Flag | None = None
    modalities: list[Literal["text"]] | None = None
    enable_thinking: Flag | None = None
    chat_template_kwargs: TemplateOptions | None = None
    thinking: Thinking | None = None
    thinking_budget: Tokens | None = None
    """Tokens after which thinking is ended."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    """"none" and "minimal" turn thinking off, the others on."""

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("the field top_logprobs may only be set when logprobs is true")
        if self.demanded and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("an answer cannot be a demanded tool call and of a response_format at once")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        """The newer name wins."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def budget(self) -> int | None:
        """Tokens after which thinking must end, in either spelling."""
        return self.thinking_budget or (self.thinking.budget_tokens if self.thinking else None)

    @property
    def thinks(self) -> bool | None:
        """Whether the request turns thinking on or off, in any of its spellings; None if in none."""
        if self.enable_thinking is not None:
            return self.enable_thinking
        if self.chat_template_kwargs is not None and self.chat_template_kwargs.enable_thinking is not None:
            return self.chat_template_kwargs.enable_thinking
        if self.thinking is not None:
            return self.thinking.type == "enabled"
        return None if self.reasoning_effort is None else self.reasoning_effort not in ("none", "minimal")


class CompletionRequest(Generation):
    """`POST /v1/completions`: a prompt as text or token ids, or several, each with an answer of its own."""

    prompt: Prompts
    """A text, token ids, or a list of either."""
    echo: Flag | None = None
    """Whether the answer begins with the prompt."""
    logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(strict=True, ge=1, le=1)] | None = None
    suffix: None = None

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs


class TokenizeRequest(Body):
    """`POST /tokenize`: a text, or a conversation as the model would see it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: Flag = False
    return_token_strs: Flag = False
    """Whether to answer with the text of each token, too."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("one of the fields prompt and messages must be given")
        return self


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1_000_000)]


Asked = TypeVar("Asked", bound=BaseModel)


def parse(kind: type[Asked], body: bytes) -> Asked:
    """The request of this kind in a body of JSON. Raises `ApiError` 400 that names the first field at fault."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise explain(error) from None


def explain(error: ValidationError) -> ApiError:
    """One sentence about the first thing that is wrong. Never repeats a value that was sent."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        reason = message.removeprefix("Invalid JSON: ").split(" at line")[0]
        return bad_request(f"The body is not valid JSON: {reason}.", code="invalid_json")
    param = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        # The client's own name for a field is repeated only where it is fit for a log and a terminal.
        shown = param if re.fullmatch(r"[\w.]{1,80}", param, re.ASCII) else None
        return bad_request(f"The field {shown or 'of that name'} is not supported.", shown, "unsupported_field")
    if not param:
        return bad_request(f"{message[:1].upper()}{message[1:]}.")
    return bad_request(f"{param}: {message[:1].lower()}{message[1:]}.", param)
