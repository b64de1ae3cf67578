"""`POST /v1/completions`: prompts as they are, text or token ids, each with as many answers as asked for."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from batching.stream import Stream
from batching.types import Delta, Request
from server.answer import AnswerReader
from server.caller import Caller
from server.completion import Completion
from server.disconnect import until_disconnect
from server.echo import Echo, Prompt, starts_of
from server.errors import bad_request
from server.logprobs import CompletionLogprobs, EncodedLists, prompt_logprobs
from server.request import read
from server.respond import plain, streamed
from server.sampling import sampling
from server.schema import MAX_CHOICES, CompletionRequest
from server.service import Service
from server.text import StopScanner, Text


async def completions(http: HttpRequest) -> Response:
    service: Service = http.app.state.service
    asked = await read(http, CompletionRequest)
    return await until_disconnect(http, respond(service, asked, http.state.caller))


async def respond(service: Service, asked: CompletionRequest, caller: Caller) -> Response:
    """Everything after the body was read. Raises `ApiError`."""
    completion = Completion(service.served_name(asked.model), "text_completion", "cmpl")
    with service.batcher.announce():
        prompts = await service.encoders.run(partial(encode, service, asked), asked.size, caller)
        streams = service.submit(rows(service, asked, prompts, caller))
    choices = [
        TextChoice(index, stream, service.text, asked, prompts[index // (asked.n or 1)])
        for index, stream in enumerate(streams)
    ]
    if asked.stream:
        return await streamed(completion, choices, asked.include_usage, asked.continuous_usage)
    return await plain(completion, choices)


def encode(service: Service, asked: CompletionRequest) -> list[Prompt]:
    """The prompts. Blocks for milliseconds: not on the event loop. Raises `ApiError` 400."""
    text = service.text
    prompts = [text.encode(p, special=True) if isinstance(p, str) else tuple(p) for p in asked.prompt]
    if not all(prompts):
        raise bad_request("A prompt must have at least one token.", "prompt")
    if any(max(prompt) >= service.info.vocab_size for prompt in prompts):
        raise bad_request("A token id is beyond the model's vocabulary.", "prompt")
    if not asked.echo:
        return [Prompt(tokens) for tokens in prompts]
    pairs = zip(asked.prompt, prompts, strict=True)
    return [echoed(text, p if isinstance(p, str) else text.decode(tokens), tokens, asked) for p, tokens in pairs]


def echoed(text: Text, told: str, tokens: tuple[int, ...], asked: CompletionRequest) -> Prompt:
    return Prompt(tokens, told, () if asked.logprobs is None else starts_of(text, tokens, told))


def rows(service: Service, asked: CompletionRequest, prompts: Sequence[Prompt], caller: Caller) -> list[Request]:
    """A row for each choice of each prompt, in OpenAI's order: all choices of the first prompt first."""
    count = asked.n or 1
    if count * len(prompts) > max(MAX_CHOICES, len(prompts)):
        raise bad_request(f"Prompts times n may be at most {MAX_CHOICES}.", "n")
    least = 0 if asked.max_tokens == 0 else 1
    return [
        Request(
            id=caller.row_id(place * count + choice),
            prompt=prompt.tokens,
            sampling=sampling(
                service, asked, service.room_for_output(len(prompt.tokens), "prompt", least=least), choice=choice
            ),
            time_limit=service.settings.request_timeout_s,
            client=caller.name,
            weight=caller.share,
            priority=asked.priority or 0,
            salt=service.salt_of(caller),
            trace=caller.trace,
        )
        for place, prompt in enumerate(prompts)
        for choice in range(count)
    ]


class TextChoice:
    """`Choice` of a completion."""

    def __init__(self, index: int, stream: Stream, text: Text, asked: CompletionRequest, prompt: Prompt) -> None:
        self.stream = stream
        self._index = index
        self._text = text
        self._echo = Echo(text, prompt, asked.logprobs) if asked.echo else None
        self._prompt_top = asked.prompt_logprobs
        self._logprobs = CompletionLogprobs(text, len(prompt.text))
        scanner = StopScanner(asked.stop or (), inclusive=bool(asked.include_stop_str_in_output))
        self._answer = AnswerReader(stream, text.detokenizer(), scanner)
        self._said: list[str] = []
        self._encoded = EncodedLists()
        self._prompt = EncodedLists()
        self._finish: str | None = None

    def _read(self, arrived: Delta) -> Iterator[tuple[str, dict[str, Any] | None, str | None]]:
        """Text, its log probabilities and why the answer is over: of the prompt, and of what was generated."""
        if self._echo is not None:
            text, logprobs = self._echo.push(arrived.prompt_logprobs)
            if text or logprobs:
                yield text, logprobs, None
        text, finish = self._answer.push(arrived)
        if text or arrived.logprobs or finish:
            yield text, self._logprobs.push(arrived.logprobs), finish

    def add(self, arrived: Delta) -> None:
        for text, logprobs, finish in self._read(arrived):
            self._said.append(text)
            self._encoded.add(logprobs)
            self._finish = finish
        if self._prompt_top is not None and arrived.prompt_logprobs:
            told = prompt_logprobs(self._text, arrived.prompt_logprobs, self._prompt_top)
            self._prompt.add({"prompt_logprobs": told})

    def whole(self) -> dict[str, Any]:
        choice = self._choice("".join(self._said), self._encoded.whole(), self._finish)
        return choice | (self._prompt.whole() or {})

    def chunks(self, arrived: Delta) -> list[dict[str, Any]]:
        return [self._choice(*part) for part in self._read(arrived)]

    def _choice(self, text: str, logprobs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": finish}
