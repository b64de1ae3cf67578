"""Other people's clients, run for real against a scripted model: each is answered, and understands the answer."""

import threading
from itertools import count

import pytest

from batching.events import Rejected
from server.sse import PING, Pinged
from tests.clients.client import CLIENTS
from tests.clients.model import ANSWERS, scripted_model
from tests.clients.recording import FOLDER, Recording, different, recording, shape
from tests.live import live

pytestmark = pytest.mark.clients


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_understands_every_answer_and_its_history_is_answered(name: str) -> None:
    client = CLIENTS[name]
    version = client.needed()
    with live(scripted_model(), default_max_tokens=1024) as service, recording() as sent:
        found = client.run(service.url)
        refused = [event for event in service.events if isinstance(event, Rejected)]
    assert found == {what: ANSWERS[what.split(":")[0]] for what in found}
    assert {what.split(":")[0] for what in found} == client.does
    assert not refused
    recorded = Recording.read(FOLDER / f"{name}.json")
    if version == recorded.version:
        shapes = [(one.path, set(shape(one.body))) for one in recorded.requests]
        for one in different(sent):
            assert (one.path, set(shape(one.body))) in shapes, f"python -m tests.clients.recording {name}"


@pytest.mark.parametrize("name", ["openai-python", "langchain", "ai-sdk"])
def test_a_client_reads_over_the_comments_of_a_stream_that_is_silent_for_long(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = CLIENTS[name]
    client.needed()
    send, pinged, pings = Pinged.send, threading.Event(), count()

    async def noting(stream: Pinged, frames: bytes) -> None:
        await send(stream, frames)
        if frames == PING:
            next(pings)
            pinged.set()

    monkeypatch.setattr(Pinged, "send", noting)

    def slow(step: int) -> None:
        if step < 2:  # before the first token, and after it
            pinged.clear()
            pinged.wait(0.1)  # a collected answer has none

    with live(scripted_model(before_step=slow), first_byte_s=0.03, default_max_tokens=1024) as service:
        found = client.run(service.url)
    assert found == {what: ANSWERS[what.split(":")[0]] for what in found}
    assert {what.split(":")[0] for what in found} == client.does
    assert next(pings) >= 2
