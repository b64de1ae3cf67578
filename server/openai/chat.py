"""`POST /v1/chat/completions`: a conversation as the model reads it, and its answer as a message."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile

import orjson

from batching.stream import Stream
from batching.types import Delta, Forced, Grammar
from server import replies
from server.http.errors import bad_request
from server.model.served_model import ServedModel
from server.model.text import Text
from server.openai.choices import ChoicesAnswer
from server.openai.endpoint import Answer, Generated, GeneratingEndpoint
from server.openai.logprobs import EncodedLists, chat_logprobs, prompt_logprobs
from server.openai.messages import ToolNames, names_in, render
from server.openai.prefill import Begun, begun, prefill_of
from server.openai.requests import ChatRequest, Row, check_prompt, rows_of, stop_tokens, truncated
from server.output.answer import AnswerReader, ContentScanner, StopScanner, first_of, one_by_one
from server.output.detokenize import MAX_HELD
from server.output.message import Event, MessageReader, as_legacy, complete_call, delta, end_of_first_call, fold
from server.output.reasoning import ReasoningSplitter, ThoughtState


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat as the model reads it, with what is needed to parse the answer."""

    chat: ChatRequest
    tokens: tuple[int, ...]
    thought: ThoughtState
    names: ToolNames
    begun: tuple[Begun, ...] = ()
    """One for each choice, if the client began the answer."""


class ChatEndpoint(GeneratingEndpoint[Generated, Conversation]):
    """A kind of request that the model reads as a chat."""

    @abstractmethod
    def as_chat(self, body: Generated) -> ChatRequest:
        """The request as a chat completion. Runs on a helper thread. Raises `ApiError` 400."""

    def encode(self, model: ServedModel, body: Generated) -> tuple[Conversation, list[Row]]:
        """A row for each choice."""
        chat = self.as_chat(body)
        conversation = encode(model.text, chat, model.settings.thinking)
        check_prompt(model, conversation.tokens, "messages")
        tokens, budget = truncated(model, chat, conversation.tokens), chat.budget
        forced = end_of_thought(model.text, chat, conversation.thought, budget) if budget else None
        prediction = model.text.encode(chat.prediction.text) if chat.prediction else ()
        known = tuple(takewhile(lambda token: token < model.info.vocab_size, prediction))
        rows = rows_of(model, chat, tokens, "messages", forced, known)
        return replace(conversation, tokens=tokens), rows

    async def grammar(self, model: ServedModel, body: Generated, encoded: Conversation, client: str) -> Grammar | None:
        """Of the whole answer, thought included. A required call is the whole answer. If calls are optional, the answer
        is either calls or what is wanted otherwise."""
        chat, thought, form = encoded.chat, encoded.thought, encoded.chat.constraint
        if chat.offered and (chat.demanded or form):
            shown = encoded.names.shown
            return await model.grammars.tool_calls(
                [(shown(tool.function.name), tool.function.parameters) for tool in chat.demanded or chat.offered],
                model.text.format.tools,
                parallel=not (chat.one_call or chat.named),
                otherwise=None if chat.demanded else form,
                thought=thought,
                client=client,
                param="functions" if chat.is_legacy else "tools",
            )
        return await model.grammars.of(form, thought=thought, client=client) if form else None


class ChatCompletions(ChatEndpoint[ChatRequest]):
    """`POST /v1/chat/completions`."""

    kind = ChatRequest

    def as_chat(self, body: ChatRequest) -> ChatRequest:
        return body

    def answer(
        self, model: ServedModel, name: str, body: ChatRequest, encoded: Conversation, streams: Sequence[Stream]
    ) -> Answer:
        text = model.text
        readers = [EventReader(stream, text, encoded, choice) for choice, stream in enumerate(streams)]
        choices = [ChatChoice(index, reader, text, body) for index, reader in enumerate(readers)]
        return ChatAnswer(name, model.fingerprint, streams, choices, body)


def encode(text: Text, chat: ChatRequest, thinking: bool) -> Conversation:
    """Render and tokenize; `thinking` is the default. Runs on a helper thread. Raises `ApiError` 400."""
    names = names_in(chat.messages, chat.offered)
    prefill = None
    if chat.continue_final_message:
        prefill = prefill_of(chat.messages, chat.n or 1, has_tools=bool(chat.offered))
    rendered = render(text, chat.messages, chat, names, thinking, prefill.field if prefill else None)
    thought = prefill.thought_state(text.format, rendered) if prefill else text.format.thought_after(rendered)
    tokens = text.encode(rendered)
    conversation = Conversation(chat, tokens, thought, names)
    if prefill is None:
        return conversation
    new_reader, echo = partial(reader, text, conversation), bool(chat.echo)
    return replace(conversation, begun=tuple(begun(new_reader, prefill, echo=echo) for _ in range(chat.n or 1)))


def prompt_length(model: ServedModel, chat: ChatRequest) -> int:
    """Number of tokens of a chat's prompt, as its usage says. Runs on a helper thread. Raises `ApiError` 400."""
    return len(truncated(model, chat, encode(model.text, chat, model.settings.thinking).tokens))


def reader(text: Text, conversation: Conversation) -> MessageReader:
    """A new reader of an answer in this conversation."""
    parser = text.format.tools.parser() if conversation.chat.offered else None
    return MessageReader(text.format.splitter(conversation.thought), parser, conversation.names.meant)


def scanner_of(chat: ChatRequest, splitter: ReasoningSplitter | None) -> StopScanner:
    """Looks for the chat's stop strings, but not in a thought if a `splitter` is given to find its end: it is not where
    one of them holds the closing tag, as that of a client who wants the thought alone."""
    stops, inclusive = chat.stop or (), bool(chat.include_stop_str_in_output)
    if splitter is None:
        return StopScanner(stops, inclusive=inclusive)
    return ContentScanner(stops, splitter, inclusive=inclusive)


def end_of_thought(text: Text, chat: ChatRequest, thought: ThoughtState, budget: int) -> Forced | None:
    """How a thought is ended after `budget` tokens. Raises `ApiError` 400 if the model has no tokens for its thinking
    tags."""
    if not thought.to_come:
        return None
    forced = text.format.forced_end(thought, budget)
    # If the request does not ask for thinking and the prompt leaves it to the model, there may be no thought to end.
    if forced is None and (chat.thinks or thought is ThoughtState.OPENED):
        raise bad_request(
            "This model has no thinking tags, so its thinking cannot have a budget; leave it out.", "thinking_budget"
        )
    return forced


class EventReader:
    """Turns one row's tokens into events and a finish reason.

    If only one call is allowed, the answer ends after it. Of an answer that the client began, only the rest is
    returned, unless the request wants all of it.
    """

    def __init__(self, stream: Stream, text: Text, conversation: Conversation, choice: int = 0) -> None:
        chat, thinking = conversation.chat, text.format.thinking
        self._end_of_thought = thinking.tags.close.encode() if thinking else b""
        self._stream = stream
        self._thinking_tokens = 0
        self._thought = b""  # the end of what was counted, in which the closing tag may have begun
        self._vocabulary = text.vocabulary
        self._one_call = chat.one_call
        after = conversation.tokens[-MAX_HELD:] if chat.continue_final_message else ()
        self._called = False  # whether there was a complete call
        self.latest = Delta(())
        """What was pushed last, without tokens after the answer's end."""
        self._begun = conversation.begun[choice] if conversation.begun else None
        self._message = self._begun.reader if self._begun else reader(text, conversation)
        self._thinks = self._message.thinking
        thought_alone = any(self._end_of_thought in stop.encode() for stop in chat.stop or ())
        splitter = text.format.splitter(conversation.thought) if self._thinks and not thought_alone else None
        scanner = scanner_of(chat, splitter)
        self._answer = AnswerReader(stream, text.detokenizer(after=after), scanner, stop_tokens(text, chat))

    def push(self, arrived: Delta) -> tuple[list[Event], replies.FinishReason | None]:
        """Events and, if the answer has ended, its finish reason."""
        if not self._one_call or len(arrived.tokens) < 2:
            found = self._push(arrived)
            self.latest = self._answer.latest
            return found
        # One at a time, because those that arrive together after the call are no part of the answer.
        events: list[Event] = []
        for count, token in enumerate(one_by_one(arrived), 1):
            more, finish = self._push(token)
            events += more
            if finish:
                self._stream.stop(unread=len(arrived.tokens) - count)
                self.latest = first_of(arrived, count)
                return events, finish
        self.latest = arrived
        return events, None

    def _push(self, arrived: Delta) -> tuple[list[Event], replies.FinishReason | None]:
        text, finish = self._answer.push(arrived)
        events = self._message.push(text)
        if self._begun:
            events[:0] = self._begun.take()
        if self._thinks:
            self._thinks = self._message.thinking
            self._count(self._answer.latest.tokens)
        if finish:
            events += self._message.flush()
        if self._one_call and (end := end_of_first_call(events)) is not None:
            self._stream.stop()
            events, finish = events[:end], "stop"
        self._called = self._called or complete_call(events)
        if self._begun:
            events = self._begun.rest(events)
        return events, "tool_calls" if self._called and finish == "stop" else finish

    @property
    def held(self) -> int:
        """Bytes of the tokens so far whose text is held back, such as a part of a tag, or was cut off."""
        return self._answer.held + self._message.held

    @property
    def stop_reason(self) -> str | int | None:
        """The stop string or the token of `stop_token_ids` that ended the answer, if one did."""
        return self._answer.stop_reason

    @property
    def thought_tokens(self) -> int:
        """Number of tokens up to the end of the thought, tags included."""
        return self._thinking_tokens if self._message.thought else 0

    def _count(self, tokens: tuple[int, ...]) -> None:
        """Up to the closing tag, which one step's tokens can hold with what follows it."""
        end = self._end_of_thought
        for token in tokens:
            if end in self._thought:
                return
            self._thinking_tokens += 1
            self._thought = self._thought[-len(end) :] + self._vocabulary.bytes_of(token)


class ChatAnswer(ChoicesAnswer[replies.ChatChoice, replies.ChunkChoice]):
    """`prompt_logprobs` stand beside the choices, because all of them continue the same prompt."""

    prefix = "chatcmpl"

    def __init__(
        self,
        model: str,
        fingerprint: str,
        streams: Sequence[Stream],
        choices: Sequence[ChatChoice],
        body: ChatRequest,
    ) -> None:
        super().__init__(model, fingerprint, streams, choices, body)
        self._chat_choices = choices
        self._prompt_ids: replies.OfPrompt = {}
        if body.return_token_ids:
            self._prompt_ids = {"prompt_token_ids": list(streams[0].row.request.prompt)}
            self._extra = orjson.dumps(self._prompt_ids)

    def completion(self, choices: list[replies.ChatChoice], usage: replies.Usage) -> replies.ChatCompletion:
        return {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
            "choices": choices,
            "usage": usage,
            **self._prompt_ids,
            **self._chat_choices[0].of_prompt(),
        }

    def usage(self) -> replies.Usage:
        counts = super().usage()
        if thought := sum(choice.thought_tokens for choice in self._chat_choices):
            counts.setdefault("completion_tokens_details", {})["reasoning_tokens"] = thought
        return counts

    def empty_chunk(self) -> replies.ChatChunk:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
            "choices": [],
        }


class ChatChoice:
    """`Choice` of a chat completion."""

    def __init__(self, index: int, reader: EventReader, text: Text, body: ChatRequest) -> None:
        self._index = index
        self._reader = reader
        self._text = text
        self._legacy = body.is_legacy
        self._as_ids = bool(body.return_tokens_as_token_ids)
        self._ids: list[int] | None = [] if body.return_token_ids else None
        self._begun = False
        self._events: list[Event] = []
        self._logprobs = EncodedLists[replies.ChatLogprobs]() if body.logprobs else None
        self._prompt_logprobs = EncodedLists[replies.OfPrompt]() if body.prompt_logprobs is not None else None
        self._finish: replies.FinishReason

    def add(self, arrived: Delta) -> None:
        events, finish = self._reader.push(arrived)
        arrived = self._reader.latest
        self._events += events
        if finish:
            self._finish = finish
        if self._ids is not None:
            self._ids += arrived.tokens
        if self._logprobs:
            self._logprobs.add(chat_logprobs(self._text, arrived.logprobs, as_ids=self._as_ids))
        if self._prompt_logprobs and arrived.prompt_logprobs:
            self._prompt_logprobs.add(prompt_logprobs(self._text, arrived.prompt_logprobs))

    @property
    def thought_tokens(self) -> int:
        return self._reader.thought_tokens

    def of_prompt(self) -> replies.OfPrompt:
        """The prompt's fields, which stand beside the choices."""
        return (self._prompt_logprobs.whole() if self._prompt_logprobs else None) or {}

    def whole(self) -> replies.ChatChoice:
        message = fold(self._events)
        choice: replies.ChatChoice = {
            "index": self._index,
            "message": as_legacy(message) if self._legacy else message,
            "logprobs": self._logprobs.whole() if self._logprobs else None,
            "finish_reason": self._reason(self._finish),
            "stop_reason": self._reader.stop_reason,
        }
        if self._ids is not None:
            choice["token_ids"] = self._ids
        return choice

    def chunks(self, arrived: Delta) -> list[replies.ChunkChoice]:
        """The first has only the role. The finish reason shares a chunk with the last text, if both came in this step:
        RAGFlow picks the language of its notice about a cut answer by the text in that chunk."""
        events, finish = self._reader.push(arrived)
        arrived = self._reader.latest
        logprobs = chat_logprobs(self._text, arrived.logprobs, as_ids=self._as_ids) if arrived.logprobs else None
        deltas = [change for event in events if (change := delta(event)) is not None]
        if not deltas and (logprobs or (self._ids is not None and arrived.tokens)):
            deltas = [{"content": ""}]
        if finish and (not deltas or "tool_calls" in deltas[-1]):
            deltas.append({})
        chunks = [] if self._begun else [self._chunk({"role": "assistant", "content": ""})]
        self._begun = True
        last = len(deltas) - 1
        for n, change in enumerate(deltas):
            chunks.append(self._chunk(change, None if n else logprobs, finish if n == last else None))
        if self._ids is not None and chunks:
            chunks[-1]["token_ids"] = list(arrived.tokens)
        return chunks

    def _chunk(
        self,
        change: replies.Delta,
        logprobs: replies.ChatLogprobs | None = None,
        finish: replies.FinishReason | None = None,
    ) -> replies.ChunkChoice:
        if self._legacy:
            change = as_legacy(change)
        chunk: replies.ChunkChoice = {
            "index": self._index,
            "delta": change,
            "logprobs": logprobs,
            "finish_reason": finish and self._reason(finish),
        }
        if finish:
            chunk["stop_reason"] = self._reader.stop_reason
        return chunk

    def _reason(self, finish: replies.FinishReason) -> replies.FinishReason:
        return "function_call" if self._legacy and finish == "tool_calls" else finish
