"""`POST /v1/completions`: prompts as they are, text or token ids, each with as many answers as asked for."""

from collections.abc import Sequence
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
from server.errors import bad_request
from server.logprobs import CompletionLogprobs, EncodedLists
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
    choices = [TextChoice(index, stream, service.text, asked) for index, stream in enumerate(streams)]
    if asked.stream:
        return await streamed(completion, choices, asked.include_usage, asked.continuous_usage)
    return await plain(completion, choices)


def encode(service: Service, asked: CompletionRequest) -> list[tuple[int, ...]]:
    """The ids of each prompt. Blocks for milliseconds: not on the event loop. Raises `ApiError` 400."""
    prompts = [service.text.encode(p, special=True) if isinstance(p, str) else tuple(p) for p in asked.prompt]
    if not all(prompts):
        raise bad_request("A prompt must have at least one token.", "prompt")
    if any(max(prompt) >= service.info.vocab_size for prompt in prompts):
        raise bad_request("A token id is beyond the model's vocabulary.", "prompt")
    return prompts


def rows(
    service: Service, asked: CompletionRequest, prompts: Sequence[tuple[int, ...]], caller: Caller
) -> list[Request]:
    """A row for each choice of each prompt, in OpenAI's order: all choices of the first prompt first."""
    count = asked.n or 1
    if count * len(prompts) > max(MAX_CHOICES, len(prompts)):
        raise bad_request(f"Prompts times n may be at most {MAX_CHOICES}.", "n")
    return [
        Request(
            id=caller.row_id(place * count + choice),
            prompt=prompt,
            sampling=sampling(service, asked, service.room_for_output(len(prompt), "prompt"), choice=choice),
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

    def __init__(self, index: int, stream: Stream, text: Text, asked: CompletionRequest) -> None:
        self.stream = stream
        self._index = index
        prompt = asked.prompt[index // (asked.n or 1)] if asked.echo else ""
        self._echo = prompt if isinstance(prompt, str) else text.decode(prompt)
        self._logprobs = CompletionLogprobs(text, len(self._echo))
        scanner = StopScanner(asked.stop or (), inclusive=bool(asked.include_stop_str_in_output))
        self._answer = AnswerReader(stream, text.detokenizer(), scanner)
        self._said: list[str] = []
        self._encoded = EncodedLists()
        self._finish: str | None = None

    def add(self, arrived: Delta) -> None:
        text, self._finish = self._answer.push(arrived)
        self._said.append(text)
        self._encoded.add(self._logprobs.push(arrived.logprobs))

    def whole(self) -> dict[str, Any]:
        return self._choice("".join([self._echo, *self._said]), self._encoded.whole(), self._finish)

    def chunks(self, arrived: Delta) -> list[dict[str, Any]]:
        echo, self._echo = self._echo, ""
        text, finish = self._answer.push(arrived)
        chunks = [self._choice(echo, None, None)] if echo else []
        if text or arrived.logprobs or finish:
            chunks.append(self._choice(text, self._logprobs.push(arrived.logprobs), finish))
        return chunks

    def _choice(self, text: str, logprobs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": finish}
