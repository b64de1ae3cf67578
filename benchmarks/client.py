"""One streamed chat request: send it, note when each piece of text came, name what went wrong.

All on one event loop, read inside the connection's callback: a chunk costs the client one JSON decoding.
"""

import asyncio
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import orjson

from benchmarks.connection import Connection, request, server_url
from benchmarks.workloads import Job

# Servers that tell thinking from answer stream the thinking under one of the two other names.
TEXT_FIELDS = ("content", "reasoning_content", "reasoning")


class AnswerError(Exception):
    """The server was reached, but its answer is not as requested. Failures are counted by `kind`."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


@dataclass(slots=True)
class Record:
    """What one request did. Times are in seconds: `due` and `sent` since the level began, the others since `due`.

    `due` is when the request was meant to be sent; a client that is late sends after it.
    """

    serial: int
    max_tokens: int
    due: float
    sent: float
    chunks: list[float] = field(default_factory=list)  # arrival of each chunk that carried text
    latency: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    detail: str = ""
    cached_tokens: int = 0  # of the prompt, where the server says so

    @property
    def ttft(self) -> float | None:
        """Time to the first chunk with text."""
        return self.chunks[0] if self.chunks else None

    @property
    def gaps(self) -> list[float]:
        """Times between neighbouring chunks; 0 where two came in one read."""
        return [later - earlier for earlier, later in pairwise(self.chunks)]

    @property
    def per_token(self) -> float | None:
        """(last chunk - first chunk) / (tokens - 1), tokens as the server counts; None for fewer than two."""
        if len(self.chunks) < 2 or self.completion_tokens < 2:
            return None
        return (self.chunks[-1] - self.chunks[0]) / (self.completion_tokens - 1)


class ChatClient:
    """Asks one model on one server, over as many connections as there are requests at once.

    `url` is the server's root, with or without `/v1`; `timeout` is in seconds. `fields` go into every request's body.
    With `full_length`, an answer of another length than asked for is a failure. A job's conversation is named in the
    header `session_header`, if there is one.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout: float,
        fields: dict[str, Any],
        full_length: bool,
        api_key: str | None,
        session_header: str | None = None,
    ) -> None:
        self._url = server_url(url)
        self._model = model
        self._timeout = timeout
        self._fields = fields
        self._full_length = full_length
        self._headers = ["Content-Type: application/json", "Accept: text/event-stream"]
        self._headers += [f"Authorization: Bearer {api_key}"] if api_key else []
        self._session_header = session_header
        self._idle: list[Connection] = []

    def close(self) -> None:
        """Close the connections that are left."""
        for connection in self._idle:
            connection.close()

    async def ask(self, job: Job, began: float, due: float) -> Record:
        """Send one job, due this many seconds after `began`, and read its answer to the end.

        Failures are noted in the record, never raised.
        """
        message = self._request(job)
        record = Record(job.serial, job.max_tokens, due, sent=time.perf_counter() - began)
        try:
            async with asyncio.timeout(self._timeout):
                await self._exchange(message, Answer(record, began + due))
            self._check(record)
        except (AnswerError, OSError) as error:
            record.error, record.detail = classify(error), str(error)
        record.latency = time.perf_counter() - began - due
        return record

    def _request(self, job: Job) -> bytes:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": job.messages,
            "max_tokens": job.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        data = orjson.dumps(body | self._fields)
        session = [f"{self._session_header}: {job.conversation}"] if self._session_header and job.conversation else []
        return request(self._url, "POST", "/v1/chat/completions", data, *self._headers, *session)

    async def _exchange(self, message: bytes, answer: "Answer") -> None:
        connection = await self._connection()
        try:
            status = await connection.send(message, answer.receive)
        except BaseException:
            connection.close()
            raise
        self._give_back(connection)
        if status != 200:
            raise AnswerError(f"http {status}", words_of(answer.rest))

    async def _connection(self) -> Connection:
        while self._idle:
            if (connection := self._idle.pop()).usable:
                return connection
        return await Connection.open(self._url)

    def _give_back(self, connection: Connection) -> None:
        if connection.usable:
            self._idle.append(connection)
        else:
            connection.close()

    def _check(self, record: Record) -> None:
        """Raises AnswerError for an answer that ended early or did not say how it ended."""
        if record.finish_reason is None:
            raise AnswerError("protocol", "the answer has no finish_reason")
        if record.completion_tokens == 0:
            raise AnswerError("protocol", "the answer has no usage")
        if self._full_length and record.completion_tokens != record.max_tokens:
            raise AnswerError("incomplete", f"{record.completion_tokens} of {record.max_tokens} tokens")


class Answer:
    """Reads one response into its record as it arrives. `rest` is unread data, or the body of a refusal."""

    def __init__(self, record: Record, start: float) -> None:
        self.rest = b""
        self._record = record
        self._start = start

    def receive(self, status: int, data: bytes) -> None:
        """Take the next piece of the body. Raises AnswerError as `note` does."""
        at = time.perf_counter() - self._start
        self.rest += data
        if status == 200:
            events, self.rest = split_events(self.rest)
            for event in events:
                note(event, at, self._record)


def words_of(body: bytes) -> str:
    """What the body of a refusal says, without the JSON around it if it is an error of OpenAI's kind."""
    try:
        return str(orjson.loads(body)["error"]["message"])
    except (KeyError, TypeError, ValueError):
        return body.decode(errors="replace")[:200]


def split_events(data: bytes) -> tuple[list[bytes], bytes]:
    """The payloads of all complete `data:` lines, and the unfinished line that the next read continues."""
    *lines, rest = data.split(b"\n")
    return [line[5:].strip() for line in lines if line.startswith(b"data:")], rest


def note(event: bytes, at: float, record: Record) -> None:
    """Write one event into the record. Raises AnswerError for an error frame and for what cannot be read."""
    if event == b"[DONE]":
        return
    try:
        chunk = orjson.loads(event)
        if error := chunk.get("error"):
            raise AnswerError("error frame", str(error)[:200])
        if usage := chunk.get("usage"):
            record.prompt_tokens = usage["prompt_tokens"]
            record.completion_tokens = usage["completion_tokens"]
            record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        for choice in chunk.get("choices") or ():
            _note_choice(choice, at, record)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AnswerError("protocol", f"{type(error).__name__} in {event[:100]!r}") from error


def _note_choice(choice: dict[str, Any], at: float, record: Record) -> None:
    delta = choice.get("delta") or {}
    if any(delta.get(name) for name in TEXT_FIELDS):
        record.chunks.append(at)
    record.finish_reason = choice.get("finish_reason") or record.finish_reason


def classify(error: Exception) -> str:
    """The kind a failure is counted by: "timeout", "connection" (a cut stream too), or an answer's own.

    Answers fail as "http STATUS", "error frame" (an error inside a started stream), "protocol" (unreadable,
    or no finish_reason or usage) or "incomplete" (fewer or more tokens than asked).
    """
    match error:
        case AnswerError():
            return error.kind
        case TimeoutError():
            return "timeout"
        case _:
            return "connection"
