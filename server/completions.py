"""`POST /v1/completions`: prompts as they are, text or token ids, each with as many answers as asked for."""

from collections.abc import Iterator, Sequence

from batching.stream import Stream
from batching.types import Delta
from server import replies
from server.answer import AnswerReader
from server.caller import Caller
from server.choices import ChoicesAnswer
from server.echo import Echo, Echoed, starts_of
from server.endpoint import Answer, GeneratingEndpoint, Prompt
from server.errors import bad_request
from server.logprobs import CompletionLogprobs, EncodedLists, prompt_logprobs
from server.sampling import sampling
from server.schema import MAX_CHOICES, CompletionRequest
from server.served_model import ServedModel
from server.text import StopScanner, Text


class Completions(GeneratingEndpoint[CompletionRequest, list[Echoed]]):
    """`POST /v1/completions`."""

    kind = CompletionRequest

    def encode(self, model: ServedModel, body: CompletionRequest) -> list[Echoed]:
        text = model.text
        prompts = [text.encode(p, special=True) if isinstance(p, str) else tuple(p) for p in body.prompt]
        if not all(prompts):
            raise bad_request("A prompt must have at least one token.", "prompt")
        if any(max(prompt) >= model.info.vocab_size for prompt in prompts):
            raise bad_request("A token id is beyond the model's vocabulary.", "prompt")
        if not body.echo:
            return [Echoed(tokens) for tokens in prompts]
        pairs = zip(body.prompt, prompts, strict=True)
        return [echoed(text, p if isinstance(p, str) else text.decode(tokens), tokens, body) for p, tokens in pairs]

    async def prompts(
        self, model: ServedModel, body: CompletionRequest, encoded: list[Echoed], caller: Caller
    ) -> Sequence[Prompt]:
        """In OpenAI's order: all choices of the first prompt first."""
        count = body.n or 1
        if count * len(encoded) > max(MAX_CHOICES, len(encoded)):
            raise bad_request(f"Prompts times n may be at most {MAX_CHOICES}.", "n")
        least = 0 if body.max_tokens == 0 else 1
        rooms = [model.room(len(prompt.tokens), "prompt", least=least) for prompt in encoded]
        return [
            Prompt(prompt.tokens, sampling(model, body, room, choice=choice), priority=body.priority or 0)
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
        return TextAnswer(name, streams, choices, body)


def echoed(text: Text, told: str, tokens: tuple[int, ...], asked: CompletionRequest) -> Echoed:
    return Echoed(tokens, told, () if asked.logprobs is None else starts_of(text, tokens, told))


class TextAnswer(ChoicesAnswer[replies.TextChoice, replies.TextChunkChoice]):
    prefix = "cmpl"

    def completion(self, choices: list[replies.TextChoice], usage: replies.Usage) -> replies.TextCompletion:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
            "usage": usage,
        }

    def empty_chunk(self) -> replies.TextChunk:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": [],
        }


class TextChoice:
    """`Choice` of a completion."""

    def __init__(self, index: int, stream: Stream, text: Text, asked: CompletionRequest, prompt: Echoed) -> None:
        self._index = index
        self._text = text
        self._echo = Echo(text, prompt, asked.logprobs) if asked.echo else None
        self._prompt_top = asked.prompt_logprobs
        self._logprobs = CompletionLogprobs(text, len(prompt.text))
        scanner = StopScanner(asked.stop or (), inclusive=bool(asked.include_stop_str_in_output))
        self._answer = AnswerReader(stream, text.detokenizer(), scanner)
        self._said: list[str] = []
        self._encoded = EncodedLists[replies.TextLogprobs]()
        self._prompt = EncodedLists[replies.OfPrompt]()
        self._finish: replies.Ending

    def _read(self, arrived: Delta) -> Iterator[tuple[str, replies.TextLogprobs | None, replies.Ending | None]]:
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
            if finish:
                self._finish = finish
        if self._prompt_top is not None and arrived.prompt_logprobs:
            self._prompt.add(prompt_logprobs(self._text, arrived.prompt_logprobs, self._prompt_top))

    def whole(self) -> replies.TextChoice:
        return {
            "index": self._index,
            "text": "".join(self._said),
            "logprobs": self._encoded.whole(),
            "finish_reason": self._finish,
            **(self._prompt.whole() or {}),
        }

    def chunks(self, arrived: Delta) -> list[replies.TextChunkChoice]:
        return [
            {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": finish}
            for text, logprobs, finish in self._read(arrived)
        ]
