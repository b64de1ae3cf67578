"""Inputs that took other services down. Each has its answer here, and hurts neither those beside it nor those after."""

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import orjson
import pytest

from batching.types import Request
from server.http.errors import RETRIED
from server.settings import PREFIX
from tests.fakes import ScriptedEngine
from tests.live import QUESTION, Live, eventually, live, raw_request, says, scripted
from tests.server.test_app import babble

HUGE = 10**6
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
GOOD = "Hello!"
MATE = "I am unharmed."


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def content_of(answer: httpx2.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def stepped() -> ScriptedEngine:
    return scripted(says(GOOD, mate=MATE), stepped=True)


@pytest.fixture(scope="module")
def shared() -> Iterator[Live]:
    """One service for all that is refused, because nothing of that may change it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.upper().startswith(PREFIX):
                patch.delenv(name)
        with live(stepped()) as service:
            yield service


@contextlib.contextmanager
def beside_a_mate(service: Live, pool: ThreadPoolExecutor) -> Iterator[None]:
    """The block happens in the midst of somebody's answer, who gets all of it. After that a good request gets its own.

    In the block nothing else is answered, unless it releases steps itself.
    """
    engine = service.engine
    run = sum(map(len, engine.batches))
    mate = pool.submit(service.chat, headers={"x-request-id": "mate"})
    service.wait_running(run + 1)
    before = engine.steps  # not earlier: an answer is out before its last step is counted
    engine.release(2)
    eventually(lambda: engine.steps == before + 2, "two steps")
    yield
    engine.release(len(MATE) + 1 - 2)
    assert content_of(mate.result()) == MATE
    good = pool.submit(service.chat)
    engine.release(len(GOOD) + 1)
    assert content_of(good.result()) == GOOD


@contextlib.contextmanager
def alone_beside_a_mate(pool: ThreadPoolExecutor) -> Iterator[Live]:
    """The same on a service of one's own, which holds nothing in the end."""
    with live(stepped()) as service:
        with beside_a_mate(service, pool):
            yield service
        assert service.get("/health/ready").status_code == 200
        eventually(lambda: service.sample("microbatch_running_rows") == 0, "no row is left")
        assert service.sample("microbatch_queue_depth") == 0


def refused(answer: httpx2.Response, status: int = 400) -> dict[str, Any]:
    """The error object of a refusal that nobody takes for a passing trouble."""
    assert answer.status_code == status, answer.text[:500]
    assert not RETRIED.search(answer.text), answer.text
    assert len(answer.content) < 1000, "what was sent is not sent back"
    error: dict[str, Any] = answer.json()["error"]
    return error


def chat(**fields: Any) -> bytes:
    return orjson.dumps({"messages": QUESTION} | fields)


def chat_with(field: str, json: str) -> bytes:
    """Spelled out, because no Python value is `1e999`."""
    return chat()[:-1] + f', "{field}": {json}}}'.encode()


def text_with(field: str, json: str) -> bytes:
    return f'{{"prompt": "Hi", "{field}": {json}}}'.encode()


def prompt_of(json: str) -> bytes:
    return f'{{"prompt": {json}}}'.encode()


def nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"x": schema}, "required": ["x"], "additionalProperties": False}
    return schema


def of_schema(schema: Any) -> bytes:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    return chat(response_format=form)


def of_tool(parameters: Any) -> bytes:
    return chat(tools=[{"type": "function", "function": {"name": "f", "parameters": parameters}}])


def of_content(json: str) -> bytes:
    return f'{{"messages": [{{"role": "user", "content": {json}}}]}}'.encode()


LOOP: dict[str, Any] = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
ENDLESS = {"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"], "additionalProperties": False}
DEEP = "[" * 1000 + "]" * 1000

REFUSED: dict[str, tuple[str, bytes]] = {
    "a million choices": (CHAT, chat(n=HUGE)),
    "a million choices of a text": (TEXT, text_with("n", str(HUGE))),
    "the best of a million": (TEXT, text_with("best_of", str(HUGE))),
    "the best of 2**64": (TEXT, text_with("best_of", str(2**64))),
    "no messages": (CHAT, chat(messages=[])),
    "an empty prompt": (TEXT, prompt_of('""')),
    "an empty list of prompts": (TEXT, prompt_of("[]")),
    "a hundred thousand prompts": (TEXT, prompt_of("[" + ",".join(['"x"'] * 100_000) + "]")),
    "a hundred thousand prompts of ids": (TEXT, prompt_of("[" + ",".join(["[1]"] * 100_000) + "]")),
    "a hundred thousand empty messages": (CHAT, chat(messages=[{}] * 100_000)),
    "five thousand messages": (CHAT, chat(messages=QUESTION * 5000)),
    "half a million stop strings": (CHAT, chat(stop=["x"] * 500_000)),
    "half a million stop strings of a text": (TEXT, text_with("stop", "[" + ",".join(['"x"'] * 500_000) + "]")),
    "an empty stop string": (CHAT, chat(stop=[""])),
    "a stop string of a megabyte": (CHAT, chat(stop="x" * 2**20)),
    "fifty thousand bad words": (CHAT, chat(bad_words=["x"] * 50_000)),
    "fifty thousand stop tokens": (CHAT, chat(stop_token_ids=[1] * 50_000)),
    "a million likeliest tokens": (CHAT, chat(logprobs=True, top_logprobs=HUGE)),
    "a million likeliest tokens of a text": (TEXT, text_with("logprobs", str(HUGE))),
    "a bias beyond the vocabulary": (CHAT, chat(logit_bias={"257": 1})),
    "a bias on a token of 2**63": (CHAT, chat(logit_bias={str(2**63): 1})),
    "a bias on a negative token": (CHAT, chat(logit_bias={"-1": 1})),
    "a bias on a token in other digits": (CHAT, chat(logit_bias={"\u0661": 1})),
    "a bias of 1e300": (CHAT, chat_with("logit_bias", '{"1": 1e300}')),
    "a bias of NaN": (CHAT, chat_with("logit_bias", '{"1": NaN}')),
    "a bias without bounds": (CHAT, chat_with("logit_bias", '{"1": -1e999}')),
    "a bias on every token": (CHAT, chat(logit_bias={str(token): 1 for token in range(100_000)})),
    "a stop token beyond the vocabulary": (CHAT, chat(stop_token_ids=[257])),
    "a stop token of 2**63": (CHAT, chat_with("stop_token_ids", f"[{2**63}]")),
    "a negative stop token": (CHAT, chat(stop_token_ids=[-1])),
    "a stop token of true": (CHAT, chat(stop_token_ids=[True])),
    "a prompt id beyond the vocabulary": (TEXT, prompt_of("[257]")),
    "a prompt id of 2**63": (TEXT, prompt_of(f"[{2**63}]")),
    "a negative prompt id": (TEXT, prompt_of("[1, -1]")),
    "a prompt id of true": (TEXT, prompt_of("[1, true]")),
    "an id of 2**63 to turn into text": ("/detokenize", f'{{"tokens": [{2**63}]}}'.encode()),
    "a length of 0": (TEXT, text_with("max_tokens", "0")),
    "a length of true": (TEXT, text_with("max_tokens", "true")),
    "a length in quotes": (TEXT, text_with("max_tokens", '"12"')),
    "a length below zero": (CHAT, chat(max_tokens=-1)),
    "a least length below zero": (CHAT, chat(min_tokens=-1)),
    "a temperature below zero": (TEXT, text_with("temperature", "-1")),
    "a temperature of NaN": (TEXT, text_with("temperature", "NaN")),
    "a temperature without bounds": (TEXT, text_with("temperature", "1e999")),
    "a top_p of 2": (TEXT, text_with("top_p", "2")),
    "a seed of 2**64": (CHAT, chat_with("seed", str(2**64))),
    "a priority of a million": (CHAT, chat(priority=-HUGE)),
    "a schema with a pattern that is none": (CHAT, of_schema({"type": "string", "pattern": "(["})),
    "a schema with a pattern that looks back": (CHAT, of_schema({"type": "string", "pattern": "(?<=a)b"})),
    "a schema with a multiple of true": (CHAT, of_schema({"type": "number", "multipleOf": True})),
    "a schema with a type that is none": (CHAT, of_schema({"type": "stuff"})),
    "a schema that is only itself": (CHAT, of_schema(LOOP)),
    "a schema without an end": (CHAT, of_schema(ENDLESS)),
    "a schema that refers to the network": (CHAT, of_schema({"$ref": "http://192.0.2.1/schema.json"})),
    "a schema that refers to a file": (CHAT, of_schema({"$ref": "file:///etc/passwd"})),
    "a schema 1000 deep": (CHAT, chat_with("response_format", DEEP)),
    "a schema of a megabyte": (CHAT, of_schema({"enum": ["x" * 2**20]})),
    "a schema that compiles for ever": (
        CHAT,
        of_schema({"allOf": [{"type": "string", "pattern": f"^.*x{n}.*$"} for n in range(39)]}),
    ),
    "a pattern of 32,000 brackets": (CHAT, of_schema({"type": "string", "pattern": "[^" + "[" * 32_000})),
    "a constant of 100,000 characters": (CHAT, of_schema({"const": "x" * 100_000})),
    "a million counted repetitions": (CHAT, of_schema({"type": "string", "pattern": "((a{1000}){1000}){1000}"})),
    "a schema that is no object": (CHAT, of_schema("string")),
    "a tool 64 deep": (CHAT, of_tool(nested(64))),
    "a tool of a megabyte": (CHAT, of_tool({"description": "x" * 2**20})),
    "ten thousand tools": (
        CHAT,
        chat(tools=[{"type": "function", "function": {"name": f"f{n}"}} for n in range(10_000)]),
    ),
    "a template of its own": (CHAT, chat(chat_template="{% for x in range(10**9) %}x{% endfor %}")),
    "a template in its options": (
        CHAT,
        chat(chat_template_kwargs={"chat_template": "{% for x in range(10**9) %}x{% endfor %}"}),
    ),
    "a switch for tokenizing": (CHAT, chat(chat_template_kwargs={"tokenize": True})),
    "an option nested deeply": (CHAT, chat_with("chat_template_kwargs", f'{{"x": {DEEP}}}')),
    "a template to tokenize with": (
        "/tokenize",
        orjson.dumps({"messages": QUESTION, "chat_template": "{{ 1 }}"}),
    ),
    "an image": (CHAT, of_content('[{"type": "image_url", "image_url": {"url": "http://192.0.2.1/x.png"}}]')),
    "a sound": (CHAT, of_content('[{"type": "input_audio", "input_audio": {"data": "eA==", "format": "wav"}}]')),
    "a film": (CHAT, of_content('[{"type": "video_url", "video_url": {"url": "file:///etc/passwd"}}]')),
    "an image to tokenize": (
        "/tokenize",
        of_content('[{"type": "image_url", "image_url": {"url": "http://192.0.2.1/x.png"}}]'),
    ),
    "a text of 3 MB": (CHAT, of_content('"' + "x" * 3_000_000 + '"')),
    "a text of 3 MB to complete": (TEXT, prompt_of('"' + "x" * 3_000_000 + '"')),
    "half of a surrogate pair": (TEXT, prompt_of('"\\ud800"')),
    "half of a surrogate pair to tokenize": ("/tokenize", prompt_of('"\\udfff"')),
    "half of a surrogate pair as a stop string": (CHAT, chat_with("stop", '"\\ud800"')),
    "half of a surrogate pair as a name": (CHAT, chat_with("\\ud800", "1")),
    "invalid UTF-8": (TEXT, prompt_of('"').replace(b'"}', b'\xff"}')),
    "a raw NUL": (TEXT, prompt_of('"\x00"')),
    "lists a thousand deep": (TEXT, prompt_of(DEEP)),
    "lists a hundred thousand deep": (CHAT, b"[" * 100_000),
    "lists a thousand deep to tokenize": ("/tokenize", prompt_of(DEEP)),
    "arguments of a call that are neither text nor an object": (
        CHAT,
        chat(messages=[{"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": []}}]}]),
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused(what: str, shared: Live, pool: ThreadPoolExecutor) -> None:
    path, body = REFUSED[what]
    with beside_a_mate(shared, pool):
        assert refused(shared.post(body, path))["message"]


def test_what_is_larger_than_a_body_may_be_is_refused_by_its_announcement(pool: ThreadPoolExecutor) -> None:
    with alone_beside_a_mate(pool) as service, service.connect() as bare:
        bare.sendall(raw_request(b"{", length=100 * 2**20))
        assert bare.recv(65536).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
def test_a_text_of_10_mb_is_refused_before_it_is_tokenized(path: str, pool: ThreadPoolExecutor) -> None:
    with alone_beside_a_mate(pool) as service:
        refused(service.post(prompt_of('"' + "x" * 10_000_000 + '"'), path), 413)


ANSWERED: dict[str, tuple[bytes, str]] = {
    "a length of 10**9": (chat(max_tokens=10**9), GOOD),
    "a length of 2**64": (chat_with("max_tokens", str(2**64)), GOOD),
    "a least length of 10**9": (chat(min_tokens=10**9), GOOD),
    "a temperature of 1e-40": (chat(temperature=1e-40), GOOD),
    "a top_p of 0": (chat(top_p=0), GOOD),
    "every bias allowed": (chat(logit_bias={str(token): -100 for token in range(257)}), GOOD),
    "all stop strings allowed": (chat(stop=[chr(0x4E00 + n) * 256 for n in range(16)]), GOOD),
    "an escaped NUL": (of_content('"a\\u0000b"'), GOOD),
    "keys twice": (b'{"messages": [], "n": 9, "n": 1, ' + chat()[1:], GOOD),
    "text that looks like a call": (of_content('"' + "<tool_call>{" * 300 + '"'), GOOD),
    "text that looks like the end": (of_content('"' + "<|end|>" * 500 + '"'), GOOD),
    "text that looks like a template": (of_content('"{{ 7 * 7 }}{% for x in range(10**9) %}"'), GOOD),
    "text of one letter": (of_content('"' + "a" * 3000 + '"'), GOOD),
    "text of marks that combine": (of_content('"' + "\u0301" * 1000 + '"'), GOOD),
}


@pytest.mark.parametrize("what", ANSWERED)
def test_it_is_answered(what: str, pool: ThreadPoolExecutor) -> None:
    body, text = ANSWERED[what]
    with alone_beside_a_mate(pool) as service:
        answer = pool.submit(service.post, body)
        service.wait_queued(1)
        service.engine.release(100_000)
        assert content_of(answer.result()) == text


def test_a_body_in_chunks_of_a_byte_is_put_together(pool: ThreadPoolExecutor) -> None:
    with alone_beside_a_mate(pool) as service:
        answer = pool.submit(service.post, iter([bytes([byte]) for byte in chat()]))
        service.wait_queued(1)
        service.engine.release(100_000)
        assert content_of(answer.result()) == GOOD


CALLS = {
    "without an end": '<tool_call>{"name": "f", "arguments": {"x": "' + "a" * 2000,
    "nested": "<tool_call>" * 50 + "</tool_call>" * 50,
    "of arguments a thousand deep": '<tool_call>{"name": "f", "arguments": {"x": ' + DEEP + "}}</tool_call>",
    "of another name": '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
    "of no JSON": "<tool_call>f(x)</tool_call>",
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", CALLS)
def test_an_answer_that_looks_like_a_call_and_is_none_is_some_text(what: str, stream: bool) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    with live(scripted(says(CALLS[what])), max_output_tokens=HUGE, default_max_tokens=HUGE) as service:
        answer = service.chat(tools=tools, stream=stream)
        assert answer.status_code == 200
        assert '"error"' not in answer.text
        assert content_of(service.chat(messages=QUESTION)) == CALLS[what]


# Connections


LYING: dict[str, Callable[[bytes], bytes]] = {
    "longer than its length": lambda body: raw_request(body + b"GARBAGE " * 100, length=len(body)),
    "with two lengths": lambda body: raw_request(body, f"Content-Length: {len(body) + 5}"),
    "with a length below zero": lambda body: raw_request(body, length=-1),
    "with a length that is no number": lambda body: raw_request(body).replace(
        f"Content-Length: {len(body)}".encode(), b"Content-Length: 1e3"
    ),
    "with a chunk that is none": lambda body: raw_request(b"zz\r\n\r\n", "Transfer-Encoding: chunked").replace(
        b"Content-Length: 6\r\n", b""
    ),
    "with a huge header": lambda body: raw_request(body, "X-Padding: " + "x" * 2**20),
    "with many headers": lambda body: raw_request(body, *(f"X-{n}: {'x' * 100}" for n in range(5000))),
    "of no HTTP": lambda body: b"\x16\x03\x01\x02\x00\x01\x00" + b"\x00" * 200 + b"\r\n\r\n",
}


@pytest.mark.parametrize("what", LYING)
def test_a_request_that_is_no_good_http_hurts_nobody(what: str, pool: ThreadPoolExecutor) -> None:
    hung_up = contextlib.suppress(ConnectionError)  # as the service may do in the midst of it
    with alone_beside_a_mate(pool) as service, service.connect() as bare, hung_up:
        bare.sendall(LYING[what](chat(max_tokens=1)))
        service.engine.release(100_000)
        answer = bare.recv(65536)
        assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 200"))


def test_connections_that_say_nothing_keep_nobody_out(pool: ThreadPoolExecutor) -> None:
    with alone_beside_a_mate(pool) as service, contextlib.ExitStack() as stack:
        for n in range(200):
            bare = stack.enter_context(service.connect())
            if n % 2:
                bare.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        answer = pool.submit(service.chat)
        service.wait_queued(1)
        service.engine.release(100_000)
        assert content_of(answer.result()) == GOOD


def test_a_client_that_reads_nothing_holds_up_nobody(pool: ThreadPoolExecutor) -> None:
    length = 20_000

    def script(request: Request, position: int) -> int:
        return says(GOOD)(request, position) if request.id == "good" else babble(request, position)

    with live(scripted(script, context_window=HUGE), max_batch_size=2, max_output_tokens=HUGE) as service:
        with service.connect() as bare:
            bare.sendall(raw_request(chat(max_tokens=length, stream=True, n=2)))
            # Its rows come to their end though nobody takes their tokens, of which a few large chunks are left.
            ended = service.wait_ended(2)
            assert [event.output_tokens for event in ended] == [length] * 2
            assert content_of(service.chat(headers={"x-request-id": "good"})) == GOOD
        eventually(lambda: service.sample("microbatch_running_rows") == 0, "no row is left")
