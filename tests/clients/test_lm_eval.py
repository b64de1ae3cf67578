"""EleutherAI's lm-eval runs tasks of ours through the service: choices, scored as transformers itself scores them, and
answers, which are those that the openai package gets."""

import functools
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from batching import checkpoint, model
from server.settings import Settings
from tests.clients.client import PYTHON, SECONDS, VARIABLES, Client
from tests.live import ROOT, SMALL, Process, environment, process

pytestmark = [pytest.mark.clients, pytest.mark.model]

LM_EVAL = Client("facts.yaml", "lm_eval", frozenset())
TASKS = Path(__file__).parent / "tasks"
DOCUMENTS = [json.loads(line) for line in (TASKS / "facts.jsonl").read_text().splitlines()]
NAME = "smollm2-135m-instruct"
CLOSE = 1e-3


@dataclass(frozen=True)
class Scores:
    """Of each document each choice's log-likelihood and whether it is what greedy decoding says; and the accuracies."""

    choices: list[list[tuple[float, bool]]]
    accuracy: float
    accuracy_by_length: float


@functools.cache
def folder() -> str:
    LM_EVAL.needed()
    return checkpoint.locate(None, "auto", Settings.model_fields["cache_dir"].default)


@pytest.fixture(scope="module", params=["generate", "packed"])
def service(request: pytest.FixtureRequest) -> Iterator[Process]:
    folder()
    with process("--engine", request.param, *SMALL) as found:
        found.wait_ready()
        yield found


def lm_eval(
    service: Process, out: Path, task: str, batch_size: int, kind: str = "local-completions", **options: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The results and samples of a task with lm-eval's model type for services like this one."""
    path = "/v1/completions" if kind == "local-completions" else "/v1/chat/completions"
    options |= {"model": NAME, "base_url": f"{service.url}{path}", "tokenizer": folder()}
    command = [
        *(str(PYTHON / "bin" / "lm-eval"), "run", "--model", kind),
        *("--model_args", ",".join(f"{name}={value}" for name, value in options.items())),
        *("--batch_size", str(batch_size)),
        *("--include_path", str(TASKS), "--tasks", task, "--log_samples", "--output_path", str(out)),
        *(["--apply_chat_template"] if kind == "local-chat-completions" else []),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "cache")}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(**VARIABLES, **offline),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    [results] = out.glob("*/results_*.json")
    [samples] = out.glob(f"*/samples_{task}_*.jsonl")
    documents = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return json.loads(results.read_text())["results"][task], documents


def scores(service: Process, out: Path, batch_size: int, **options: Any) -> Scores:
    found, documents = lm_eval(service, out, "facts", batch_size, **options)
    told = [[(float(score), said == "True") for [[score, said]] in sample["resps"]] for sample in documents]
    return Scores(told, found["acc,none"], found["acc_norm,none"])


@functools.cache
def transformers_own() -> Scores:
    """The same of the model itself: a forward pass for each choice, with the tokens that lm-eval cuts it into."""
    tokenizer = AutoTokenizer.from_pretrained(folder())
    loaded = model.load(folder(), device="cpu", dtype="float32", load_format="auto")
    found = [
        [likelihood(loaded, tokenizer, document["question"], choice) for choice in document["choices"]]
        for document in DOCUMENTS
    ]
    right, right_by_length = 0, 0
    for document, scores in zip(DOCUMENTS, found, strict=True):
        values = [score for score, _ in scores]
        by_length = [value / len(choice) for value, choice in zip(values, document["choices"], strict=True)]
        right += values.index(max(values)) == document["answer"]
        right_by_length += by_length.index(max(by_length)) == document["answer"]
    return Scores(found, right / len(DOCUMENTS), right_by_length / len(DOCUMENTS))


@torch.inference_mode()
def likelihood(loaded: Any, tokenizer: Any, question: str, choice: str) -> tuple[float, bool]:
    ids = tokenizer(f"{question} {choice}").input_ids
    start = len(tokenizer(question).input_ids)
    logprobs = loaded(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
    own = torch.tensor(ids[start:])
    return float(logprobs.gather(-1, own[:, None]).sum()), bool((logprobs.argmax(-1) == own).all())


@pytest.mark.parametrize(
    "options",
    [
        {"tokenized_requests": True, "batch_size": 16},
        {"tokenized_requests": False, "batch_size": 1, "num_concurrent": 4},
    ],
    ids=["token-ids", "texts"],
)
def test_a_task_is_scored_as_by_transformers_itself(options: dict[str, Any], service: Process, tmp_path: Path) -> None:
    found, own = scores(service, tmp_path, **options), transformers_own()
    assert 0 < own.accuracy < 1
    for theirs, ours in zip(found.choices, own.choices, strict=True):
        assert [score for score, _ in theirs] == pytest.approx([score for score, _ in ours], abs=CLOSE)
        assert [greedy for _, greedy in theirs] == [greedy for _, greedy in ours]
    assert any(greedy for scores in own.choices for _, greedy in scores)
    assert (found.accuracy, found.accuracy_by_length) == (own.accuracy, own.accuracy_by_length)
    sent = sum(len(document["choices"]) for document in DOCUMENTS)
    assert service.sample("microbatch_finished_requests_total", reason="length") >= sent


@pytest.mark.parametrize("kind", ["local-chat-completions", "local-completions"])
def test_answers_are_those_that_any_client_gets(kind: str, service: Process, tmp_path: Path) -> None:
    found, documents = lm_eval(service, tmp_path, "answers", 1, kind, num_concurrent=4)
    answers = [sample["resps"][0][0] for sample in documents]
    with service.openai() as client:
        asked: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 12, "stop": ["\n", "."]}
        for document, answer in zip(DOCUMENTS, answers, strict=True):
            if kind == "local-completions":
                expected = client.completions.create(prompt=document["question"], **asked).choices[0].text
            else:
                messages: Any = [{"role": "user", "content": document["question"]}]
                expected = client.chat.completions.create(messages=messages, **asked).choices[0].message.content or ""
            assert answer == expected
    right = [answer == d["choices"][d["answer"]] for d, answer in zip(DOCUMENTS, answers, strict=True)]
    assert found["exact_match,none"] == pytest.approx(sum(right) / len(right))
    assert any(answers)
