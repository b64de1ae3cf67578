"""Laws of long silence: no stream is silent for longer than `--first-byte-s`; what fails before has a status."""

import threading
from typing import Any

import orjson
import pytest

from batching.errors import EngineError
from tests.live import PATIENCE, Live, frames, live, scripted, text_of

QUICK = 0.02
BODIES: dict[str, Any] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
}


def streamed(service: Live, path: str, release: threading.Event) -> tuple[int, list[str]]:
    """Status and frames of a stream whose model is held until a comment has come."""
    body = orjson.dumps(BODIES[path] | {"stream": True})
    with service.http() as http, http.stream("POST", path, content=body) as response:
        pieces = []
        for piece in response.iter_text():
            pieces.append(piece)
            if ": ping\n\n" in piece:
                release.set()
        return response.status_code, "".join(pieces).split("\n\n")


@pytest.mark.parametrize("path", BODIES)
def test_a_silent_stream_has_its_status_and_comments_and_then_the_same_answer(path: str) -> None:
    release = threading.Event()
    with live(scripted(before_step=lambda step: hold(release)), first_byte_s=QUICK) as service:
        status, found = streamed(service, path, release)
        quiet = service.post(orjson.dumps(BODIES[path] | {"stream": True}), path)
    assert status == 200
    assert ": ping" in found
    assert found[0] == ": ping"
    assert said(found) == said(quiet.text.split("\n\n"))
    assert "Hello!" in said(found)


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_needs_no_extension_of_the_server(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body = orjson.dumps(BODIES[path] | {"stream": True})
    with live() as service:
        usual = service.post(body, path)
        monkeypatch.setattr("server.http.exchange.WRITE", "another server's")
        other = service.post(body, path)
    assert (usual.status_code, other.status_code) == (200, 200)
    assert said(other.text.split("\n\n")) == said(usual.text.split("\n\n"))
    assert "Hello!" in said(other.text.split("\n\n"))


def hold(release: threading.Event) -> None:
    assert release.wait(PATIENCE)


def said(found: list[str]) -> str:
    """The text of an answer's frames, and how it ended, however it was cut into pieces."""
    lines = [line for frame in found for line in frame.split("\n") if line.startswith("data: {")]
    return "".join(text for line in lines for text in texts(orjson.loads(line.removeprefix("data: "))))


def texts(event: dict[str, Any]) -> list[str]:
    if "type" in event:
        return [event["delta"]] if event["type"].endswith("text.delta") else []
    [choice] = event["choices"]
    return [choice.get("text") or choice.get("delta", {}).get("content") or "", choice["finish_reason"] or ""]


@pytest.mark.parametrize("path", BODIES)
def test_a_failure_after_the_status_is_the_last_frame(path: str) -> None:
    release = threading.Event()

    def fails(step: int) -> None:
        hold(release)
        raise EngineError("no more")

    with live(scripted(before_step=fails), first_byte_s=QUICK) as service:
        status, found = streamed(service, path, release)
    assert status == 200
    assert "engine_error" in found[-2] or "response.failed" in found[-2]
    assert "[DONE]" not in "".join(found)


@pytest.mark.parametrize("path", BODIES)
def test_a_failure_before_it_is_a_status(path: str) -> None:
    def fails(step: int) -> None:
        raise EngineError("no more")

    with live(scripted(before_step=fails)) as service:
        assert service.post(orjson.dumps(BODIES[path] | {"stream": True}), path).status_code == 500


def test_a_client_that_leaves_in_the_silence_takes_its_row_with_it() -> None:
    release = threading.Event()
    with live(scripted(before_step=lambda step: hold(release)), first_byte_s=QUICK) as service:
        body = orjson.dumps(BODIES["/v1/chat/completions"] | {"stream": True})
        with service.http() as http, http.stream("POST", "/v1/chat/completions", content=body) as response:
            assert next(response.iter_text()) == ": ping\n\n"
        [ended] = service.wait_ended()
        release.set()
        assert ended.outcome == "cancelled"


def test_a_stream_that_speaks_has_no_comments() -> None:
    with live() as service:
        answer = service.chat(stream=True)
    assert ": ping" not in answer.text
    assert text_of(frames(answer)) == "Hello!"


def test_a_plain_answer_waits_as_long_as_it_takes() -> None:
    release = threading.Event()
    with live(scripted(before_step=lambda step: hold(release)), first_byte_s=QUICK) as service:
        threading.Timer(10 * QUICK, release.set).start()
        answer = service.chat()
    assert answer.json()["choices"][0]["message"]["content"] == "Hello!"
