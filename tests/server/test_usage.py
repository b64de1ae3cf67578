"""Laws of the token counts in answers, on the engine that shares what prompts begin with."""

from collections.abc import Iterator
from typing import Any

import orjson
import pytest
import torch

from batching.packed.engine import PackedEngine
from batching.packed.kv_cache import BLOCK_SIZE
from batching.packed.speculation import StepCost
from tests.live import BYTES, Live, frames, live, tokens_of
from tests.tiny import tiny_model

LONG = "What is the answer to the question that everybody asks? " * 4


@pytest.fixture
def service() -> Iterator[Live]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with live(PackedEngine(tiny_model(), num_slots=4, token_budget=2048, prefill_chunk=64), tokenizer=BYTES) as found:
        yield found
    torch.set_num_threads(before)


def plain(service: Live, path: str, fields: dict[str, Any]) -> tuple[int, int]:
    """Tokens of the prompt, and those of them that were cached."""
    return counts(service.post(orjson.dumps(fields), path).json()["usage"])


def streamed(service: Live, path: str, fields: dict[str, Any]) -> tuple[int, int]:
    answer = service.post(orjson.dumps(fields | {"stream": True, "stream_options": {"include_usage": True}}), path)
    return counts(frames(answer)[-2]["usage"])


def counts(usage: dict[str, Any]) -> tuple[int, int]:
    kind = "input" if "input_tokens" in usage else "prompt"
    assert usage["total_tokens"] == usage[f"{kind}_tokens"] + 3
    return usage[f"{kind}_tokens"], usage[f"{kind}_tokens_details"]["cached_tokens"]


def chat(question: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": LONG + question}], "max_tokens": 3, "ignore_eos": True}


def completion(question: str) -> dict[str, Any]:
    return {"prompt": LONG + question, "max_tokens": 3, "ignore_eos": True}


def response(question: str) -> dict[str, Any]:
    return {"input": LONG + question, "max_output_tokens": 3, "temperature": 0}


@pytest.mark.parametrize(
    ("path", "body", "ask"),
    [
        ("/v1/chat/completions", chat, plain),
        ("/v1/chat/completions", chat, streamed),
        ("/v1/completions", completion, plain),
        ("/v1/completions", completion, streamed),
        ("/v1/responses", response, plain),
    ],
)
def test_what_another_prompt_began_with_is_told_as_cached(service: Live, path: str, body: Any, ask: Any) -> None:
    prompt, cached = ask(service, path, body("One?"))
    assert cached == 0
    shared = prompt // BLOCK_SIZE * BLOCK_SIZE
    found = [ask(service, path, body(question)) for question in ("One?", "Two?")]
    assert found == [(prompt, shared)] * 2
    assert service.sample("microbatch_reused_prompt_tokens_total") == 2 * shared


def test_choices_of_one_prompt_count_what_was_cached_once(service: Live) -> None:
    prompt, _ = plain(service, "/v1/chat/completions", chat("One?"))
    usage = service.chat(**chat("One?"), n=3).json()["usage"]
    assert usage["prompt_tokens"] == prompt
    assert usage["prompt_tokens_details"] == {"cached_tokens": prompt // BLOCK_SIZE * BLOCK_SIZE}


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", chat), ("/v1/completions", completion)])
def test_what_choices_find_of_the_first_one_s_prompt_is_not_told_as_cached(service: Live, path: str, body: Any) -> None:
    usage = service.post(orjson.dumps(body("One?") | {"n": 4}), path).json()["usage"]
    assert usage["completion_tokens"] == 4 * 3
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


def test_a_predicted_answer_is_the_same_and_its_guesses_are_counted(
    service: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepCost, "worth_drafting", lambda cost, rate, num_rows, limit: limit)
    letters = {str(token): 60 for token in tokens_of("abcdefghijklmnop")}
    body = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 40, "logit_bias": letters, "seed": 1}
    plain = service.post(orjson.dumps(body)).json()
    answer = plain["choices"][0]["message"]["content"]
    assert "completion_tokens_details" not in plain["usage"]
    for content in (answer, [{"type": "text", "text": answer[:9]}, {"type": "text", "text": answer[9:]}]):
        predicted = service.post(orjson.dumps(body | {"prediction": {"type": "content", "content": content}})).json()
        assert predicted["choices"][0]["message"]["content"] == answer
        details = predicted["usage"]["completion_tokens_details"]
        assert details["accepted_prediction_tokens"] > 10
        assert details["rejected_prediction_tokens"] >= 0
    metrics = service.get("/metrics").text
    assert value(metrics, "microbatch_accepted_tokens_total") > 20
    assert value(metrics, "microbatch_drafted_tokens_total") >= value(metrics, "microbatch_accepted_tokens_total")


def test_a_prediction_of_another_kind_is_refused(service: Live) -> None:
    body = {"messages": [{"role": "user", "content": "?"}], "prediction": {"type": "image", "content": "a"}}
    assert service.post(orjson.dumps(body)).status_code == 400


def value(metrics: str, name: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith(name))
