"""`POST /v1/completions`: raw prompts, as text or token ids, each with `n` choices."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from batching.stream import Stream
from batching.types import Delta, PromptLogprob
from server import replies
from server.callers import Caller
from server.http.errors import bad_request
from server.model.served_model import ServedModel
from server.model.text import Text
from server.openai.choices import ChoicesAnswer
from server.openai.endpoint import Answer, GeneratingEndpoint, Prompt
from server.openai.logprobs import CompletionLogprobs, EncodedLists, completion_logprobs, prompt_logprobs
from server.openai.requests import MAX_CHOICES, CompletionRequest
from server.openai.sampling import sampling, stop_tokens, truncated
from server.output.answer import AnswerReader, StopScanner
from server.output.detokenize import MAX_HELD

MAX_PROMPT_IDS = 262_144
"""Limit on the ids of prompt tokens in one answer: about 2 MB of JSON."""


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

    def encode(self, model: ServedModel, body: CompletionRequest) -> list[Echoed]:
        text, special = model.text, body.add_special_tokens is not False
        prompts = [text.encode(p, special=special) if isinstance(p, str) else tuple(p) for p in body.prompt]
        for tokens in prompts:
            model.check_prompt(tokens, "prompt")
        if not body.echo:
            return [Echoed(truncated(model, body, tokens)) for tokens in prompts]
        pairs = zip(body.prompt, prompts, strict=True)
        return [echoed(model, p if isinstance(p, str) else None, tokens, body) for p, tokens in pairs]

    async def prompts(
        self, model: ServedModel, body: CompletionRequest, encoded: list[Echoed], caller: Caller
    ) -> Sequence[Prompt]:
        """In OpenAI's order: all choices of the first prompt come first.

        Raises `ApiError` 400, or 503 if too many grammars are being compiled.
        """
        count = body.n or 1
        if body.return_token_ids and count * sum(len(prompt.tokens) for prompt in encoded) > MAX_PROMPT_IDS:
            raise bad_request(
                f"An answer can have at most {MAX_PROMPT_IDS:,} ids of prompt tokens; ask for fewer choices.",
                "return_token_ids",
                "too_large",
            )
        if count * len(encoded) > max(MAX_CHOICES, len(encoded)):
            raise bad_request(f"A request can have at most {MAX_CHOICES} choices: the number of prompts times n.", "n")
        least = 0 if body.max_tokens == 0 else 1
        rooms = [model.room(len(prompt.tokens), "prompt", least=least) for prompt in encoded]
        client = caller.name or caller.request_id
        grammar = await model.grammars.of(body.constraint, client=client) if body.constraint else None
        return [
            Prompt(prompt.tokens, sampling(model, body, room, choice=choice), grammar, body.priority or 0)
            for prompt, room in zip(encoded, rooms, strict=True)
            for choice in range(count)
        ]

    def answer(
        self, model: ServedModel, name: str, body: CompletionRequest, encoded: list[Echoed], streams: Sequence[Stream]
    ) -> Answer:
        count = body.n or 1
        choices = [
            TextChoice(index, stream, model.text, body, encoded[index // count]) for index, stream in enumerate(streams)
        ]
        return TextAnswer(name, model.fingerprint, streams, choices, body)


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
