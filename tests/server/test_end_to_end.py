"""Laws of the whole service: `python -m server` as a process of its own, with the demo model where answers matter."""

import contextlib
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import orjson
import pytest

from tests.live import SMALL, Process, byte_tokenizer, eventually, frames, process, raw_request, text_of
from tests.tiny import tiny_model

pytestmark = pytest.mark.model

FRANCE: list[Any] = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
MODEL = "smollm2-135m-instruct"
LONG: dict[str, Any] = {"messages": FRANCE, "temperature": 0, "ignore_eos": True, "max_tokens": 900}


@pytest.fixture(scope="module")
def service() -> Iterator[Process]:
    with process(*SMALL, "--batch-window-ms", "50", "--max-batch-size", "8") as found:
        found.wait_ready()
        yield found


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Flags that serve a model that is loaded at once, whose answers make no sense and may be long."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(vocab_size=257, max_position_embeddings=8192).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return ("--model", str(folder), "--context-window", "8192", "--token-budget", "32768")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(24) as executor:
        yield executor


def content(response: httpx2.Response) -> str:
    """The text of an answer, streamed or plain, which must be a whole one."""
    assert response.status_code == 200, response.text
    if response.headers["content-type"].startswith("text/event-stream"):
        chunks = frames(response)
        assert chunks[-1] == "[DONE]"
        assert chunks[-2]["choices"][0]["finish_reason"] in ("stop", "length")
        return text_of(chunks)
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


def test_a_greedy_answer_is_right(service: Process) -> None:
    with service.openai() as client:
        answer = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, max_tokens=16)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"


def test_a_streamed_answer_is_the_plain_one(service: Process) -> None:
    with service.openai() as client:
        plain = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, max_tokens=24)
        with client.chat.completions.create(
            model=MODEL, messages=FRANCE, temperature=0, max_tokens=24, stream=True
        ) as stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == plain.choices[0].message.content


def mixed(n: int) -> dict[str, Any]:
    """Settings of the n-th request: greedy, seeded and unseeded ones, with and without stop strings, in turn."""
    question = ["Name a color.", "Tell me a very short story about a dog and a bird.", "What is 2 + 2?"][n % 3]
    fields: dict[str, Any] = {"messages": [{"role": "user", "content": question}], "max_tokens": 3 + n % 6}
    match n % 4:
        case 0:
            fields |= {"temperature": 0}
        case 1:
            fields |= {"temperature": 0.8, "seed": n, "top_p": 0.9}
        case 2:
            fields |= {"temperature": 1.5, "seed": -n, "top_k": 20, "presence_penalty": 0.4, "frequency_penalty": 0.7}
        case 3:
            fields |= {"temperature": 1.0, "stop": [".", "e", "\n"]}
    return fields


def test_requests_of_every_kind_share_batches_and_each_gets_its_own_answer(
    service: Process, pool: ThreadPoolExecutor
) -> None:
    before = service.samples()
    together = [pool.submit(service.chat, **mixed(n), stream=n % 2 == 0) for n in range(16)]
    texts = [content(answer.result()) for answer in together]
    eventually(lambda: service.sample("microbatch_running_rows") == 0, "the last batch ended")

    def gained(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return service.samples().get(key, 0.0) - before.get(key, 0.0)

    assert gained("microbatch_request_duration_seconds_count", outcome="answered") == 16
    assert gained("microbatch_batch_size_rows_count") < 16, "most joined a batch that was running"
    for n, text in enumerate(texts):
        if n % 4 == 3:
            assert not any(stop in text for stop in ".e\n")
        else:
            assert content(service.chat(**mixed(n))) == text, mixed(n)


def test_a_client_that_leaves_ends_its_row(service: Process) -> None:
    cancelled = service.sample("microbatch_cancelled_requests_total")
    for stream in (False, True):
        with service.connect() as bare:
            bare.sendall(raw_request(orjson.dumps(LONG | {"stream": stream})))
            eventually(lambda: service.sample("microbatch_running_rows") == 1, "the row runs")
            if stream:
                assert bare.recv(100).startswith(b"HTTP/1.1 200")
        eventually(lambda: service.sample("microbatch_running_rows") == 0, "the row ended")
    assert service.sample("microbatch_cancelled_requests_total") == cancelled + 2


def test_a_prompt_longer_than_the_window_is_refused(service: Process) -> None:
    response = service.chat(messages=[{"role": "user", "content": "word " * 2000}])
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")


@contextlib.contextmanager
def streaming(service: Process) -> Iterator[httpx2.Response]:
    """A long streamed answer whose status is known, and of which nothing else has been read."""
    with service.http() as client:
        body = orjson.dumps(LONG | {"stream": True, "max_tokens": 8000})
        with client.stream("POST", "/v1/chat/completions", content=body) as response:
            assert response.status_code == 200
            yield response


def test_it_lives_while_it_starts_limits_its_queue_and_stops_at_once_at_the_second_signal(
    quick: tuple[str, ...], pool: ThreadPoolExecutor
) -> None:
    with process(*quick, "--max-batch-size", "1", MICROBATCH_QUEUE_SIZE="1") as service:
        service.wait_listening()
        assert service.get("/health/live").status_code == 200
        for response in (service.get("/health/ready"), service.chat()):
            assert response.status_code == 503
            assert "starting" in response.text
            assert response.headers["retry-after"]
        service.wait_ready()
        with streaming(service):
            waiting = pool.submit(service.chat, max_tokens=1)
            eventually(lambda: service.sample("microbatch_queue_depth") == 1, "one waits")
            refused = service.chat()
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            service.terminate()
            eventually(lambda: service.sample("microbatch_state", state="draining") == 1, "it drains")
            service.terminate()
            assert service.wait() == 128 + signal.SIGTERM
        with pytest.raises(httpx2.TransportError):
            waiting.result()
    assert "Traceback" not in "".join(service.lines)


def test_a_signal_under_load_lets_accepted_answers_complete_and_refuses_new_ones(
    quick: tuple[str, ...], pool: ThreadPoolExecutor
) -> None:
    with process(*quick, "--log-format", "json", "--batch-window-ms", "2000", MICROBATCH_MAX_BATCH_SIZE="2") as service:
        service.wait_ready()
        running = [pool.submit(service.chat, **LONG | {"max_tokens": 1000}, stream=stream) for stream in (True, False)]
        eventually(lambda: service.sample("microbatch_output_tokens_total") > 0, "two run")
        waiting = pool.submit(service.chat, max_tokens=2, ignore_eos=True, headers={"x-request-id": "waited"})
        eventually(lambda: service.sample("microbatch_queue_depth") == 1, "one waits")
        service.terminate()
        eventually(lambda: service.sample("microbatch_state", state="draining") == 1, "it drains")
        refused = service.chat(headers={"x-request-id": "late"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "service_draining")
        streamed, plain = (answer.result() for answer in running)
        assert content(streamed) == content(plain) != ""
        assert plain.json()["usage"]["completion_tokens"] == 1000
        assert waiting.result().json()["usage"]["completion_tokens"] == 2
        assert service.wait() == 0
    lines = [orjson.loads(line) for line in service.lines]
    assert [line["message"] for line in lines if line["message"].startswith("state")] == [
        f"state {state}" for state in ("ready", "draining", "stopped")
    ]
    assert [line["outcome"] for line in lines if line.get("id") == "waited"] == ["answered"]
    assert [line["status"] for line in lines if line.get("id") == "late"] == [503]
    assert "France" not in "".join(service.lines)
    url = next(line["url"] for line in lines if line["message"] == "ready")
    assert url == f"{service.url}/v1"


def test_a_request_has_the_time_that_the_setting_gives_it(quick: tuple[str, ...]) -> None:
    with process(*quick, MICROBATCH_REQUEST_TIMEOUT_S="0.001") as service:
        service.wait_ready()
        for stream in (False, True):
            response = service.chat(stream=stream)
            assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
        service.terminate()
        assert service.wait() == 0


def test_a_signal_while_the_model_loads_ends_the_process() -> None:
    with process(*SMALL) as service:
        service.wait_listening()
        service.terminate()
        assert service.wait() == 0
    assert "Traceback" not in "".join(service.lines)


def test_an_address_in_use_is_one_line_and_status_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, process("--port", str(taken.getsockname()[1])) as service:
        assert service.wait() == 1
    [line] = service.lines
    assert "in use" in line


def test_a_wrong_flag_is_one_line_and_status_2() -> None:
    with process("--nope") as service:
        assert service.wait() == 2
    assert len(service.lines) == 1
    assert "--nope" in service.lines[0]


def test_the_packed_engine_answers_the_same_and_lets_requests_join(service: Process, pool: ThreadPoolExecutor) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["red", "blue"]}}}
    seeded = [mixed(n) for n in range(9) if n % 4 != 3]
    asked = [*seeded, mixed(0) | {"response_format": schema, "max_tokens": 12}]
    with process(*SMALL, "--engine", "packed", "--max-batch-size", "8") as packed:
        packed.wait_ready()
        together = [pool.submit(packed.chat, **fields) for fields in asked]
        texts = [content(answer.result()) for answer in together]
        assert packed.sample("microbatch_joined_requests_total") > 0
        packed.terminate()
        assert packed.wait() == 0
    assert texts[-1] in ('"red"', '"blue"')
    assert texts == [content(service.chat(**fields)) for fields in asked]
