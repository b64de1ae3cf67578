"""What waits for a client that reads its stream late is written in pieces, between which others have the event loop."""

from functools import partial
from typing import Any

import orjson
import pytest

from tests.faults.test_connections import narrow
from tests.live import QUESTION, eventually, live, raw_request
from tests.server.test_choices import TellingEngine, telling

WAITING = 300
"""Tokens of each row that wait for the reader."""


def has_passed(engine: TellingEngine, steps: int) -> bool:
    return engine.steps > steps


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": QUESTION, "n": 8, "logprobs": True, "top_logprobs": 20}),
        ("/v1/completions", {"prompt": ["a"] * 8, "logprobs": 20}),
        ("/v1/responses", {"input": "Hi", "top_logprobs": 20}),
    ],
)
def test_log_probabilities_that_wait_for_a_slow_reader_leave_the_event_loop_to_others(
    path: str, fields: dict[str, Any]
) -> None:
    length = 700
    engine: TellingEngine = telling("a" * length, stepped=True)
    body = orjson.dumps({"stream": True, "max_tokens": length} | fields)
    request = raw_request(body, "Connection: close").replace(b"/v1/chat/completions", path.encode())
    with live(engine, send_timeout_s=600.0) as service, narrow(service) as bare:
        bare.sendall(request)
        service.wait_running()
        while not any(connection.full for connection in list(service.connections)):
            assert engine.steps < length - WAITING, "the system buffers more than this test allows for"
            taken = engine.steps
            engine.release()
            eventually(partial(has_passed, engine, taken), "a step was taken")
        engine.release(length)
        eventually(lambda: len(service.ended()) == len(service.engine.batches[0]), "the rest waits")
        answer = b""
        while data := bare.recv(65_536):
            answer += data
    assert b"event: response.incomplete" in answer or b"data: [DONE]" in answer
