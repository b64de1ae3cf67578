"""`POST /v1/completions`: raw prompts, as text or token ids, each with `n` choices."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from batching.stream import Stream
from batching.types import Delta, Grammar, PromptLogprob
from server import replies
from server.fields import Flag, Integral, TokenId
from server.http.errors import bad_request
from server.model.served_model import ServedModel
from server.model.text import Text
from server.openai.choices import ChoicesAnswer
from server.openai.constraints import ResponseFormat
from server.openai.endpoint import Answer, GeneratingEndpoint
from server.openai.logprobs import CompletionLogprobs, EncodedLists, completion_logprobs, prompt_logprobs
from server.openai.requests import (
    MAX_CHOICES,
    MAX_TOP_LOGPROBS,
    UNSUPPORTED,
    Generation,
    Row,
    TokenReports,
    check_prompt,
    rows_of,
    stop_tokens,
    truncated,
)
from server.output.answer import AnswerReader, StopScanner
from server.output.detokenize import MAX_HELD

MAX_PROMPTS = 64

MAX_PROMPT_IDS = 262_144
"""Limit on the ids of prompt tokens in one answer: about 2 MB of JSON."""


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
    def _fields_agree(self) -> Self:
        if (self.best_of or 1) > (self.n or 1):
            raise ValueError("the field best_of may not be larger than n, because every answer is returned")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("the field max_tokens may only be 0 when echo is true")
        return self

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    def prompt_logprobs_with(self, choice: int) -> int | None:
        """Each choice has its own. A row that generates nothing computes them whether or not they are wanted."""
        echoed = self.logprobs if self.echo else None
        counts = [wanted for wanted in (echoed, self.prompt_logprobs) if wanted is not None]
        return max(counts, default=0 if self.max_tokens == 0 else None)


@dataclass(frozen=True)
class Echoed:
    """A prompt's tokens and, for `echo`, its text and the offset in it at which each token's text starts."""

    tokens: tuple[int, ...]
    text: str = ""
    starts: Sequence[int] = ()


class Echo:
    """Echoes a prompt: with the likeliest tokens at each position, or only its text if `logprobs` are not wanted."""

    def __init__(self, text: Text, prompt: Echoed, body: CompletionRequest) -> None:
        self._text = text
        self._prompt = prompt
        self._top = body.logprobs
        self._as_ids = bool(body.return_tokens_as_token_ids)
        self._echoed = 0  # number of tokens

    def push(self, entries: Sequence[PromptLogprob | None]) -> tuple[str, replies.TextLogprobs | None]:
        """The text and `logprobs` of the prompt's next tokens, whose log probabilities these are."""
        begin, self._echoed = self._echoed, self._echoed + len(entries)
        if self._top is None:
            self._echoed = len(self._prompt.tokens)
            return self._prompt.text if begin == 0 else "", None
        if not entries:
            return "", None
        starts = [*self._prompt.starts[begin : self._echoed + 1], len(self._prompt.text)]
        tokens = self._prompt.tokens[begin : self._echoed]
        here = self._prompt.text[starts[0] : starts[len(tokens)]]
        starts = starts[: len(tokens)]
        return here, completion_logprobs(self._text, tokens, entries, starts, self._top, as_ids=self._as_ids)


def starts_of(text: Text, tokens: Sequence[int], string: str) -> list[int]:
    """Where each token's text starts in `string`, the text that the tokens encode.

    Tokens that share a character all start where it does. Tokens that the tokenizer adds in front start at 0.
    """
    detokenizer = text.detokenizer(special=True)
    ends = [0]
    for token in tokens:
        ends.append(ends[-1] + len(detokenizer.push([token])))
    decoded = text.decode(tokens)
    before = len(decoded) - len(string) if decoded.endswith(string) else 0
    return [min(max(start - before, 0), len(string)) for start in ends[:-1]]


class Completions(GeneratingEndpoint[CompletionRequest, list[Echoed]]):
    """`POST /v1/completions`."""

    kind = CompletionRequest

    def encode(self, model: ServedModel, body: CompletionRequest) -> tuple[list[Echoed], list[Row]]:
        """In OpenAI's order: all choices of the first prompt come first."""
        encoded, count = prompts_of(model, body), body.n or 1
        if body.return_token_ids and count * sum(len(prompt.tokens) for prompt in encoded) > MAX_PROMPT_IDS:
            raise bad_request(
                f"An answer can have at most {MAX_PROMPT_IDS:,} ids of prompt tokens; ask for fewer choices.",
                "return_token_ids",
                "too_large",
            )
        if count * len(encoded) > max(MAX_CHOICES, len(encoded)):
            raise bad_request(f"A request can have at most {MAX_CHOICES} choices: the number of prompts times n.", "n")
        return encoded, [row for prompt in encoded for row in rows_of(model, body, prompt.tokens, "prompt")]

    async def grammar(
        self, model: ServedModel, body: CompletionRequest, encoded: list[Echoed], client: str
    ) -> Grammar | None:
        return await model.grammars.of(body.constraint, client=client) if body.constraint else None

    def answer(
        self, model: ServedModel, name: str, body: CompletionRequest, encoded: list[Echoed], streams: Sequence[Stream]
    ) -> Answer:
        count = body.n or 1
        choices = [
            TextChoice(index, stream, model.text, body, encoded[index // count]) for index, stream in enumerate(streams)
        ]
        return TextAnswer(name, model.fingerprint, streams, choices, body)


def prompts_of(model: ServedModel, body: CompletionRequest) -> list[Echoed]:
    """Raises `ApiError` 400."""
    text, special = model.text, body.add_special_tokens is not False
    prompts = [text.encode(p, special=special) if isinstance(p, str) else tuple(p) for p in body.prompt]
    for tokens in prompts:
        check_prompt(model, tokens, "prompt")
    if not body.echo:
        return [Echoed(truncated(model, body, tokens)) for tokens in prompts]
    pairs = zip(body.prompt, prompts, strict=True)
    return [echoed(model, p if isinstance(p, str) else None, tokens, body) for p, tokens in pairs]


def echoed(model: ServedModel, string: str | None, tokens: tuple[int, ...], body: CompletionRequest) -> Echoed:
    """`string` is the prompt's text, if it came as text."""
    text, kept = model.text, truncated(model, body, tokens)
    if string is None or len(kept) < len(tokens):
        tokens, string = kept, text.decode(kept)
    return Echoed(tokens, string, () if body.logprobs is None else starts_of(text, tokens, string))


class TextAnswer(ChoicesAnswer[replies.TextChoice, replies.TextChunkChoice]):
    prefix = "cmpl"

    def completion(self, choices: list[replies.TextChoice], usage: replies.Usage) -> replies.TextCompletion:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
            "choices": choices,
            "usage": usage,
        }

    def empty_chunk(self) -> replies.TextChunk:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
            "choices": [],
        }


class TextChoice:
    """`Choice` of a completion."""

    def __init__(self, index: int, stream: Stream, text: Text, body: CompletionRequest, prompt: Echoed) -> None:
        self._index = index
        self._text = text
        self._echo = Echo(text, prompt, body) if body.echo else None
        self._prompt_top = body.prompt_logprobs
        after = prompt.tokens[-MAX_HELD:]
        as_ids = bool(body.return_tokens_as_token_ids)
        self._logprobs = CompletionLogprobs(text, len(prompt.text), after, as_ids=as_ids)
        self._ids: list[int] | None = [] if body.return_token_ids else None
        self._prompt_ids = list(prompt.tokens)
        self._begun = False
        scanner = StopScanner(body.stop or (), inclusive=bool(body.include_stop_str_in_output))
        self._answer = AnswerReader(stream, text.detokenizer(after=after), scanner, stop_tokens(text, body))
        self._said: list[str] = []
        self._encoded = EncodedLists[replies.TextLogprobs]()
        self._prompt = EncodedLists[replies.OfPrompt]()
        self._finish: replies.Ending

    def _read(self, arrived: Delta) -> Iterator[tuple[str, replies.TextLogprobs | None, replies.Ending | None]]:
        """Text, its log probabilities and the reason it ended, first of the prompt, then of what was generated."""
        if self._echo is not None:
            text, logprobs = self._echo.push(arrived.prompt_logprobs)
            if text or logprobs:
                yield text, logprobs, None
        text, finish = self._answer.push(arrived)
        entries = self._answer.latest.logprobs
        if text or entries or finish:
            yield text, self._logprobs.push(entries), finish

    def add(self, arrived: Delta) -> None:
        for text, logprobs, finish in self._read(arrived):
            self._said.append(text)
            self._encoded.add(logprobs)
            if finish:
                self._finish = finish
        if self._ids is not None:
            self._ids += self._answer.latest.tokens
        if self._prompt_top is not None and arrived.prompt_logprobs:
            self._prompt.add(prompt_logprobs(self._text, arrived.prompt_logprobs, self._prompt_top))

    def whole(self) -> replies.TextChoice:
        choice: replies.TextChoice = {
            "index": self._index,
            "text": "".join(self._said),
            "logprobs": self._encoded.whole(),
            "finish_reason": self._finish,
            "stop_reason": self._answer.stop_reason,
        }
        if of_prompt := self._prompt.whole():
            choice["prompt_logprobs"] = of_prompt["prompt_logprobs"]
        if self._ids is not None:
            choice["token_ids"] = self._ids
            choice["prompt_token_ids"] = self._prompt_ids
        return choice

    def chunks(self, arrived: Delta) -> list[replies.TextChunkChoice]:
        read = list(self._read(arrived))
        if self._ids is not None and arrived.tokens and not read:
            read = [("", None, None)]  # tokens of a character that is not complete yet
        chunks = [self._chunk(*each) for each in read]
        if self._ids is not None and chunks:
            chunks[-1]["token_ids"] = list(self._answer.latest.tokens)
            if not self._begun:
                chunks[0]["prompt_token_ids"] = self._prompt_ids
                self._begun = True
        return chunks

    def _chunk(
        self, text: str, logprobs: replies.TextLogprobs | None, finish: replies.Ending | None
    ) -> replies.TextChunkChoice:
        chunk: replies.TextChunkChoice = {
            "index": self._index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish,
        }
        if finish:
            chunk["stop_reason"] = self._answer.stop_reason
        return chunk
