"""What clients were recorded to send, replayed against every engine with a tiny model: each body is answered."""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import orjson
import pytest
import torch
from transformers import PreTrainedModel

from batching.engine import Engine
from batching.packed.engine import PackedEngine
from batching.padded import PaddedEngine
from tests.clients.recording import FOLDER, Recording, Sent
from tests.live import END, Live, live
from tests.tiny import tiny_model


def model() -> PreTrainedModel:
    """One with the vocabulary of the live server's tokenizer, a window for the longest body, and little else."""
    one = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    return tiny_model("qwen3", 0, vocab_size=END + 1, max_position_embeddings=16_384, eos_token_id=END, **one)


ENGINES: dict[str, Callable[[], Engine]] = {
    "padded": lambda: PaddedEngine(model(), token_budget=2**17),
    "packed": lambda: PackedEngine(model(), num_slots=8, token_budget=2**17),
}
RECORDINGS = [Recording.read(file) for file in sorted(FOLDER.glob("*.json"))]


ROW = re.compile(r"^\| ([\w-]+) \| ([^|]+) \| ([^|]+) \| [^|]+ \|$", re.MULTILINE)


def test_the_table_tells_of_every_recording_and_of_no_other() -> None:
    _, _, *rows = ROW.findall((FOLDER.parent / "README.md").read_text())
    assert sorted(rows) == sorted((each.client, each.version, each.source) for each in RECORDINGS)


@pytest.fixture(scope="module", params=ENGINES)
def service(request: pytest.FixtureRequest) -> Iterator[Live]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with live(ENGINES[request.param](), default_max_tokens=8, max_output_tokens=8, max_batch_size=8) as found:
        yield found
    torch.set_num_threads(threads)


def last_of(sent: Sent, answer: httpx2.Response) -> Any:
    """The whole answer, or the last event of a streamed one that says more than that it is over."""
    if not sent.body.get("stream"):
        return answer.json()
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    if sent.path.endswith("/responses"):
        return orjson.loads(events[-1])["response"]
    if sent.path.endswith("/messages"):
        return next(found["delta"] for found in map(orjson.loads, reversed(events)) if found["type"] == "message_delta")
    assert events[-1] == "[DONE]"
    return next(found for found in map(orjson.loads, reversed(events[:-1])) if found["choices"])


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda recording: recording.client)
def test_what_a_client_sends_is_answered(service: Live, recording: Recording) -> None:
    def send(sent: Sent) -> httpx2.Response:
        return service.post(orjson.dumps(sent.body), sent.path, headers=sent.headers)

    with ThreadPoolExecutor(8) as pool:
        for sent, answer in zip(recording.requests, pool.map(send, recording.requests), strict=True):
            assert answer.status_code == 200, (sent, answer.text)
            last = last_of(sent, answer)
            if sent.path.endswith("/responses"):
                assert last["status"] in ("completed", "incomplete"), sent
            elif sent.path.endswith("/messages"):
                assert last["stop_reason"] in ("end_turn", "max_tokens", "tool_use"), sent
            else:
                assert last["choices"][0]["finish_reason"] in ("stop", "length", "tool_calls"), sent
