"""Laws of prompts that a model cannot read: those with tokens that only the tokenizer has, and those without any."""

from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from batching.packed.engine import PackedEngine
from batching.packed.speculation import StepCost
from tests.live import BYTES, TEMPLATE, Live, byte_tokenizer, live, scripted, tokens_of
from tests.server.test_app import error_of
from tests.tiny import tiny_model

EXTRA = "<extra>"
SILENT = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
"""A template that shows no system message, as some show it only with what the user says next."""


@pytest.fixture
def service() -> Iterator[Live]:
    """A model with every token of the tokenizer but `EXTRA`."""
    engine = PackedEngine(tiny_model(vocab_size=len(BYTES)), num_slots=2, token_budget=2048)
    with live(engine, tokenizer=byte_tokenizer(TEMPLATE, [EXTRA]), guarded=False) as found:
        yield found


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("chat/completions", "messages", [{"role": "user", "content": f"a {EXTRA}"}]),
        ("responses", "input", f"a {EXTRA}"),
        ("completions", "prompt", f"a {EXTRA}"),
        ("completions", "prompt", ["a", f"a {EXTRA}"]),
    ],
)
def test_a_prompt_with_a_token_that_the_model_lacks_is_refused(
    service: Live, path: str, field: str, value: Any
) -> None:
    answer = service.post(orjson.dumps({field: value}), f"/v1/{path}")
    assert error_of(answer, 400, None)["param"] == field
    assert not service.ended()


def test_a_prediction_counts_up_to_a_token_that_the_model_lacks(service: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepCost, "worth_drafting", lambda cost, rate, num_rows, limit: limit)
    letters = {str(token): 60 for token in tokens_of("abcdefghijklmnop")}
    asked: dict[str, Any] = {"max_tokens": 40, "logit_bias": letters, "seed": 1}
    answer = service.chat(**asked).json()["choices"][0]["message"]["content"]
    predicted = service.chat(**asked, prediction={"type": "content", "content": answer[:9] + EXTRA * 9}).json()
    assert predicted["choices"][0]["message"]["content"] == answer
    assert predicted["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] > 3


@pytest.mark.parametrize("path", ["chat/completions", "responses"])
def test_a_conversation_of_which_the_template_shows_nothing_is_refused(path: str) -> None:
    field = "input" if path == "responses" else "messages"
    with live(scripted(), tokenizer=byte_tokenizer(SILENT)) as service:
        body = {field: [{"role": "system", "content": "Be brief."}]}
        answer = service.post(orjson.dumps(body), f"/v1/{path}")
        assert error_of(answer, 400, None)["param"] == field
        assert not service.engine.batches
