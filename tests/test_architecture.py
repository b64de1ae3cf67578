"""Laws of how much of the house one request walks through: what a reader has to open to follow it."""

import orjson
import pytest

from tests.live import QUESTION, live, raw_request, scripted
from tests.request_path import RequestPath, followed

MOST_STAYS = 35  # 33; threads may take turns in other ways
MOST_FILES_BEFORE_THE_QUEUE = 17
MOST_FILES = 30


@pytest.fixture(scope="module")
def path() -> RequestPath:
    """Of one streamed chat with a key, sent at once, after another one."""
    body = orjson.dumps({"messages": QUESTION, "stream": True})
    sent = raw_request(body, "Authorization: Bearer secret", "Connection: close")
    with followed() as found, live(scripted("Hello!"), guarded=False, api_keys=("secret",)) as service:
        service.chat(stream=True, headers={"authorization": "Bearer secret"})
        service.wait_ended()
        service.get("/health")  # after which nothing of the first is left to do
        with service.connect() as bare:
            found.begin()
            bare.sendall(sent)
            assert bare.makefile("rb").read().startswith(b"HTTP/1.1 200 ")
        service.wait_ended(2)
        found.end()
    return found


def test_a_request_reaches_the_queue_in_few_stays_of_few_files(path: RequestPath) -> None:
    stays = path.before_queue
    assert stays[-1] == "batching/queue.py"
    assert len(stays) <= MOST_STAYS, stays
    assert len(set(stays)) <= MOST_FILES_BEFORE_THE_QUEUE, sorted(set(stays))


def test_a_streamed_chat_enters_few_files(path: RequestPath) -> None:
    assert "server/openai/endpoint.py" in path.entered
    assert len(path.entered) <= MOST_FILES, "\n".join(sorted(path.entered))
