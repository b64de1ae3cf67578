"""Send the service RAGFlow's requests, and explain what is wrong.

    python3 deploy/ragflow/selftest.py --base-url http://127.0.0.1:21010/v1 --model qwen3-4b-local

From where it matters, inside RAGFlow's container (it needs nothing but Python):

    docker exec -i CONTAINER python3 - --base-url http://host.docker.internal:21010/v1 --model qwen3-4b-local \
        < deploy/ragflow/selftest.py

Exits with 1 if anything is wrong.
"""

import argparse
import http.client
import json
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

EXAMPLE_URL = "http://host.docker.internal:21010/v1"
FIRST_WORD_SECONDS = 10.0  # what RAGFlow allows a model when it is added
AT_ONCE = 10  # chats that a knowledge base being read in asks at a time
WANTED_ANSWER = 1024  # tokens
WANTED_WINDOW = 8192  # RAGFlow's prompts have about 5,000 tokens in the median
LONGEST_TRIED = 16_384  # tokens as RAGFlow counts them; more would take minutes where there is no GPU
DIALOG = {"temperature": 0.1, "top_p": 0.3, "presence_penalty": 0.4, "frequency_penalty": 0.7}

SENTENCE = "The lighthouse at Grey Point, {n} metres above the sea, was lit by oil until 1923 and is automatic since. "
CHUNK = "ID: {n}\n├── Title: lighthouses-{n}.pdf\n└── Content:\n" + SENTENCE * 16
GUIDE = "Cite the chunk that a sentence comes from as [ID:n], at its end, and never invent an ID. " * 64
"""As long as RAGFlow's own, which comes after it has cut a prompt to its window."""

TOOL = "智能体_0"
CHINESE = (
    "灰角灯塔高三十一米，建成于一八七四年，一九二三年以前用油点灯，后来改用电灯，"
    "最后一位守塔人于一九六八年离开，此后由机器自动照管，每逢星期日对游客开放。"
)
CHINESE_TOKENS = 92  # as RAGFlow counts (cl100k)


class Wrong(Exception):
    """A fault and its remedy, in one or two sentences."""


class SmallWindow(Wrong):
    """Long prompts will fail, short ones will not."""


class Advice(Exception):
    """What RAGFlow works with, but not well, and how to make it better."""


@dataclass
class Answer:
    text: str
    thought: str
    finish: str | None
    first: float
    prompt_tokens: int = 0
    tokens: int = 0


class Service:
    """The service at RAGFlow's base URL. Everything raises `Wrong`."""

    def __init__(self, base_url: str, model: str, key: str) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Wrong(f"{base_url} is no URL; it looks like {EXAMPLE_URL}.")
        self.base_url = base_url
        self.model = model
        self._key = key
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port
        self._path = parts.path.rstrip("/").removesuffix("/v1") + "/v1"  # RAGFlow adds it where it is missing

    def models(self) -> Any:
        with self._asked("GET", "/models") as response:
            return self._json(response)

    def card(self) -> dict[str, Any]:
        """What the service lists of the model."""
        listed = self.models()
        if not isinstance(listed, dict) or "data" not in listed:
            raise Wrong(f"What answers at {self.base_url} is no OpenAI-compatible service.")
        cards = {card["id"]: card for card in listed["data"]}
        if self.model not in cards:
            raise Wrong(f"The service has no model {self.model}, only {', '.join(cards)}. Names must match exactly.")
        if "context_length" not in cards[self.model]:
            raise Wrong("The service is there and its model is still loading. Try again later.")
        found: dict[str, Any] = cards[self.model]
        return found

    def chat(self, messages: list[dict[str, Any]], **fields: Any) -> Answer:
        """One streamed or plain chat, as RAGFlow sends it: without max_tokens, thinking off."""
        stream = bool(fields.get("stream"))
        body = {"model": self.model, "messages": messages, "enable_thinking": False} | fields
        start = time.monotonic()
        with self._asked("POST", "/chat/completions", body) as response:
            return self._streamed(response, start) if stream else self._plain(response, start)

    @contextmanager
    def _asked(self, method: str, path: str, body: object = None) -> Iterator[http.client.HTTPResponse]:
        """The response to one request, on a connection of its own. Raises `Wrong` unless its status is 200."""
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        headers = {"authorization": f"Bearer {self._key}", "content-type": "application/json"}
        with closing(kind(self._host, self._port, timeout=300)) as connection:
            try:
                connection.connect()
            except OSError as error:
                raise Wrong(self._unreachable(error)) from None
            connection.request(method, self._path + path, json.dumps(body) if body else None, headers)
            with closing(connection.getresponse()) as response:
                if response.status != 200:
                    raise Wrong(self._refused(response.status, response.read().decode(errors="replace")))
                yield response

    def _unreachable(self, error: OSError) -> str:
        if isinstance(error, socket.gaierror):
            hint = (
                "On Linux give RAGFlow's container extra_hosts: host.docker.internal:host-gateway, or use its address."
            )
            return f"The name {self._host} is unknown here. {hint}"
        hint = "Is the service running, and with --host 0.0.0.0? Inside Docker 127.0.0.1 is the container itself."
        return f"Nothing answers at {self._host}:{self._port} ({error}). {hint}"

    def _refused(self, status: int, text: str) -> str:
        match status:
            case 401:
                return "The API key is not one that the service knows (--api-keys, --api-keys-file)."
            case 503:
                return "The service is there and not ready: its model is still loading, or it stops. Try again later."
            case 404 if "model_not_found" in text:
                return f"The service has no model {self.model}: {_message(text)}"
            case 404:
                return f"There is no such service at {self.base_url}; it looks like {EXAMPLE_URL}."
            case 429:
                return "The queue is full (429). Set a larger --queue-size, or ask less at a time."
            case _:
                return f"The service answered {status}: {_message(text)}"

    def _json(self, response: http.client.HTTPResponse) -> Any:
        try:
            return json.loads(response.read())
        except ValueError:
            raise Wrong(f"What answers at {self.base_url} is no OpenAI-compatible service.") from None

    def _plain(self, response: http.client.HTTPResponse, start: float) -> Answer:
        answer = self._json(response)
        [choice] = answer["choices"]
        message = choice["message"]
        return Answer(
            message["content"] or "",
            message.get("reasoning_content") or "",
            choice["finish_reason"],
            time.monotonic() - start,
            answer["usage"]["prompt_tokens"],
            answer["usage"]["completion_tokens"],
        )

    def _streamed(self, response: http.client.HTTPResponse, start: float) -> Answer:
        answer = Answer("", "", None, 0.0)
        for event in _events(response):
            if "error" in event:
                raise Wrong(f"The answer broke off: {event['error']['message']}")
            for choice in event["choices"]:
                answer.text += choice["delta"].get("content") or ""
                answer.thought += choice["delta"].get("reasoning_content") or ""
                answer.finish = choice["finish_reason"] or answer.finish
                if not answer.first and (answer.text or answer.thought):
                    answer.first = time.monotonic() - start
        return answer


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]


def _events(response: Iterable[bytes]) -> Iterator[Any]:
    """What stands in `data:` lines. Comments, which keep a slow answer's connection open, are passed over."""
    for line in response:
        field, _, data = line.decode().strip().partition(":")
        if field == "data" and data.strip() != "[DONE]":
            yield json.loads(data)


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


# The checks, in the order in which RAGFlow would hit them. Each returns its finding or raises `Wrong` or `Advice`.


def check_models(service: Service) -> str:
    card = service.card()
    window = card["max_model_len"]
    if window < WANTED_WINDOW:
        raise SmallWindow(
            f"The window is {window} tokens, and RAGFlow's prompts have about 5,000 besides the answer. Raise"
            " --context-window, or retrieve fewer chunks (top N) in RAGFlow's assistants."
        )
    return f"the model is there, with a window of {window}; enter {card['context_length']} as its maximum tokens"


def check_first_word(service: Service) -> str:
    answer = service.chat(user("Hi"), stream=True, temperature=0.9)
    if not answer.text:
        raise Wrong("The model said nothing to a first Hi; RAGFlow would refuse to add it.")
    if answer.first > FIRST_WORD_SECONDS:
        raise Wrong(f"The first word came after {answer.first:.0f} s; RAGFlow waits {FIRST_WORD_SECONDS:.0f} s for it.")
    return f"the first word came after {answer.first:.2f} s"


def check_provider_name(service: Service) -> str:
    renamed = Service(service.base_url, f"{service.model}___OpenAI-API", service._key)
    renamed.chat(user("Hi"), max_completion_tokens=1)
    return "the name that older versions of RAGFlow send is known too"


def check_dialog(service: Service) -> str:
    chunks = "\n\n".join(CHUNK.format(n=n) for n in range(6))
    system = f"Answer from these chunks alone.\n\n{chunks}\n\n{GUIDE}"
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": system},
        *user("How was the lighthouse lit in 1900?"),
    ]
    answer = service.chat(messages, stream=True, tools=[], tool_choice="auto", **DIALOG)
    if answer.thought or "<think>" in answer.text:
        raise Wrong("The model thinks although it was asked not to. Its template has no switch for that; take another.")
    return f"a prompt of six chunks got its first word after {answer.first:.2f} s, without a thought before it"


def check_history(service: Service) -> str:
    """The web chat sends its messages as it stores them."""
    kept = {"id": "a1", "files": [], "conversationId": "c1", "created_at": 1.5, "doc_ids": []}
    turns = [("user", "Hi"), ("assistant", "Hello!"), ("user", "How high is the lighthouse?")]
    service.chat([{"role": role, "content": text} | kept for role, text in turns], stream=True, **DIALOG)
    return "messages are taken with what RAGFlow's web chat stores in them"


def check_tools(service: Service) -> str:
    """Agents name their tools after components, in a Chinese interface in Chinese."""
    parameters = {"type": "object", "properties": {"question": {"type": "string"}}, "required": ["question"]}
    tool = {"type": "function", "function": {"name": TOOL, "description": "问答", "parameters": parameters}}
    call = {"id": "1", "index": 0, "type": "function", "function": {"name": TOOL, "arguments": '{"question": "高度"}'}}
    messages = [
        *user("灯塔有多高"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "三十一米"},
    ]
    service.chat(messages, stream=True, tools=[tool], tool_choice="auto", **DIALOG)
    return "a tool may have a Chinese name"


def check_chinese(service: Service) -> str:
    """A prompt as long as RAGFlow's: trimmed by its own count to the advertised number, plus its instructions."""
    card = service.card()
    told = card["context_length"]
    short, long, guide = (tokens_of(service, text) for text in (CHINESE * 4, CHINESE * 8, GUIDE))
    ratio = (long - short) / (4 * CHINESE_TOKENS)
    fits = min(told, int((card["max_model_len"] - guide - WANTED_ANSWER) / ratio))
    tried = min(fits, LONGEST_TRIED)
    system = f"{CHINESE * (tried // CHINESE_TOKENS)}\n\n{GUIDE}"
    messages = [{"role": "system", "content": system}, *user("灯塔有多高")]
    answer = service.chat(messages, stream=True, max_completion_tokens=16, **DIALOG)
    if fits < told:
        return f"where documents are Chinese enter {fits}: the model has {ratio:.1f} tokens for one that RAGFlow counts"
    return f"a Chinese prompt of {tried} tokens, as RAGFlow counts, got its first word after {answer.first:.2f} s"


def tokens_of(service: Service, text: str) -> int:
    return service.chat(user(text), max_completion_tokens=1).prompt_tokens


def check_length(service: Service) -> str:
    answer = service.chat(user("Count from 1 to 1000 in words, without leaving out any."), temperature=0.1)
    if answer.finish == "length" and answer.tokens < WANTED_ANSWER:
        raise Advice(
            f"Answers end after {answer.tokens} tokens, and RAGFlow has no say in it: it removes max_tokens from all it"
            f" sends. Start the service with --default-max-tokens {WANTED_ANSWER}."
        )
    return f"an answer may have {answer.tokens} tokens" + ("" if answer.finish == "length" else " and more")


def check_together(service: Service) -> str:
    def ask(n: int) -> float:
        start = time.monotonic()
        service.chat(user(f"List three facts about the number {n}."), max_completion_tokens=32, **DIALOG)
        return time.monotonic() - start

    alone = ask(0)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        together = max(pool.map(ask, range(AT_ONCE)))
    return f"{AT_ONCE} questions at once took {together / alone:.1f} times as long as one"


CHECKS: dict[str, Callable[[Service], str]] = {
    "model": check_models,
    "adding it": check_first_word,
    "its name": check_provider_name,
    "a question": check_dialog,
    "history": check_history,
    "tools": check_tools,
    "Chinese": check_chinese,
    "answers": check_length,
    "together": check_together,
}


def run(service: Service) -> bool:
    """Make every check and print what it found. True if nothing is wrong. Ends where the service cannot be reached."""
    good = True
    for name, check in CHECKS.items():
        try:
            report("ok", name, check(service))
        except Advice as advice:
            report("advice", name, advice)
        except Wrong as wrong:
            good = False
            report("WRONG", name, wrong)
            if check is check_models and not isinstance(wrong, SmallWindow):
                break  # nothing else can be well
        except (OSError, http.client.HTTPException) as error:
            good = False
            report("WRONG", name, f"The connection broke off: {error!r}.")
    return good


def report(verdict: str, name: str, told: object) -> None:
    print(f"{verdict:6} {name:10} {told}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Send the service RAGFlow's requests, and explain what is wrong.")
    parser.add_argument("--base-url", required=True, help="as typed into RAGFlow: http://host.docker.internal:21010/v1")
    parser.add_argument("--model", required=True, help="the model's name, as typed into RAGFlow")
    parser.add_argument("--api-key", default="none", help="as typed into RAGFlow; any unless the service has keys")
    told = parser.parse_args()
    try:
        return 0 if run(Service(told.base_url, told.model, told.api_key)) else 1
    except Wrong as wrong:
        print(f"WRONG  {wrong}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
