"""RAGFlow's self-test against services that are as they should be, and against those that are not."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.events import Outcome
from batching.types import Request
from deploy.ragflow import selftest
from server.settings import parse
from tests.live import ROOT, Live, byte_tokenizer, free_port, live, scripted, tokens_of
from tests.server.test_app import fails_at, remembering

FOLDER = ROOT / "deploy" / "ragflow"
GOOD: dict[str, Any] = {"default_max_tokens": 1024, "max_batch_size": 64}
LONG = "one two three " * 100
"""An answer of more tokens than RAGFlow wants at least."""


def run(url: str, model: str = "scripted", *flags: str) -> tuple[int, list[str]]:
    """The self-test as it is run inside a container: its exit status and lines."""
    command = [sys.executable, "-", "--base-url", f"{url}/v1", "--model", model, *flags]
    with (FOLDER / "selftest.py").open() as script:
        done = subprocess.run(command, stdin=script, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def wrong(lines: list[str]) -> dict[str, str]:
    """What is wrong, by the check that found it."""
    return {line[7:17].strip(): line[18:] for line in lines if line.startswith("WRONG")}


def test_a_service_as_it_should_be_passes_every_check() -> None:
    with live(scripted(LONG, context_window=2**16), **GOOD) as service:
        status, lines = run(service.url)
        largest = max(map(len, service.engine.batches))
    assert (status, wrong(lines)) == (0, {})
    assert [line[7:17].strip() for line in lines] == list(selftest.CHECKS)
    assert largest > 1  # the questions that came together


@pytest.mark.parametrize(
    ("service", "check", "words"),
    [
        (live(scripted("<think>hm</think>Hi." + LONG, context_window=2**16), **GOOD), "a question", "thinks"),
        (live(scripted(LONG, context_window=4096), **GOOD), "model", "--context-window"),
        (live(scripted("", context_window=2**16), **GOOD), "adding it", "said nothing"),
        (
            live(scripted(before_step=fails_at(0, RuntimeError("kernel")), context_window=2**16), **GOOD),
            "a question",
            "500: The model failed",
        ),
    ],
    ids=["thinks", "small window", "silent", "fails"],
)
def test_each_fault_is_told_in_words(service: Any, check: str, words: str) -> None:
    with service as running:
        status, lines = run(running.url)
    assert status == 1
    assert words in wrong(lines)[check]


def test_an_unconfigured_service_is_not_wrong_and_its_short_answers_are_advised_against() -> None:
    with live(scripted(LONG, context_window=2**16)) as service:
        status, lines = run(service.url)
    assert (status, wrong(lines)) == (0, {})
    [advice] = [line for line in lines if line.startswith("advice")]
    assert "--default-max-tokens 1024" in advice


@given(st.lists(st.sampled_from([b": ping\n", b"\n", b"event: x\n", b":\n"]), max_size=8), st.integers(0, 8))
def test_comments_in_a_slow_answer_are_passed_over(others: list[bytes], place: int) -> None:
    lines = [*others[:place], b'data: {"a": 1}\n', *others[place:], b"data: [DONE]\n"]
    assert list(selftest._events(lines)) == [{"a": 1}]


def test_a_number_for_chinese_documents_is_told_where_the_tokenizer_makes_more_of_them() -> None:
    with live(scripted(LONG, context_window=2**16), **GOOD) as service:
        told = selftest.check_chinese(selftest.Service(f"{service.url}/v1", "scripted", "x"))
        assert service.ended()[-1].outcome is Outcome.ANSWERED
    ratio = len(tokens_of(selftest.CHINESE)) / selftest.CHINESE_TOKENS
    guide = len(tokens_of(f"<user>{selftest.GUIDE}<|end|><assistant>"))
    assert f"enter {int((2**16 - guide - 1024) / ratio)}:" in told


def test_a_chinese_prompt_that_fills_what_is_told_is_asked_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([selftest.CHINESE])  # a tokenizer that knows Chinese very well
    seen: list[Request] = []
    engine = scripted(remembering(seen, LONG), context_window=10_000)
    with live(engine, tokenizer=tokenizer, **GOOD) as service:
        told = selftest.check_chinese(selftest.Service(f"{service.url}/v1", "scripted", "x"))
        sent = service.model.advertised_window
    assert f"a Chinese prompt of {sent} tokens" in told
    assert seen[-1].prompt.count(len(tokenizer) - 1) == sent // selftest.CHINESE_TOKENS


def test_an_8192_token_model_is_not_called_wrong() -> None:
    with live(scripted(LONG, context_window=8192), **GOOD) as service:
        told = selftest.check_models(selftest.Service(f"{service.url}/v1", "scripted", "x"))
        advertised = service.model.advertised_window
    assert f"window of 8192; enter {advertised} " in told
    assert advertised < 8192


def test_a_base_url_may_leave_out_the_prefix_that_ragflow_adds() -> None:
    with live(scripted(LONG, context_window=2**16)) as service:
        for url in (service.url, f"{service.url}/", f"{service.url}/v1", f"{service.url}/v1/"):
            assert selftest.check_models(selftest.Service(url, "scripted", "x"))


def test_it_sends_what_ragflow_s_web_chat_stores_and_a_tool_with_a_chinese_name() -> None:
    sent: list[dict[str, Any]] = []

    class Recording(selftest.Service):
        def chat(self, messages: list[dict[str, Any]], **fields: Any) -> selftest.Answer:
            sent.append({"messages": messages} | fields)
            return super().chat(messages, **fields)

    with live(scripted(LONG, context_window=2**16), **GOOD) as service:
        for check in (selftest.check_history, selftest.check_tools):
            assert check(Recording(f"{service.url}/v1", "scripted", "x"))
    history, tools = sent
    stored = {"id", "files", "conversationId", "created_at", "doc_ids"}
    assert all(stored <= message.keys() for message in history["messages"])
    assert tools["tools"][0]["function"]["name"] == "智能体_0"
    assert "智能体_0" in str(tools["messages"])


@pytest.fixture
def keyed() -> Iterator[Live]:
    with live(scripted(LONG, context_window=2**16), api_keys=("secret",), **GOOD) as service:
        yield service


def test_a_wrong_key_is_told_and_the_right_one_passes(keyed: Live) -> None:
    status, lines = run(keyed.url)
    assert status == 1
    assert "API key" in wrong(lines)["model"]
    assert run(keyed.url, "scripted", "--api-key", "secret")[0] == 0


def test_what_cannot_be_asked_at_all_ends_with_one_line() -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    with live(ready=False) as loading, live() as service:
        cases = [
            (run(nowhere), "--host 0.0.0.0"),
            (run("http://name.invalid:1"), "unknown here"),
            (run("ftp://127.0.0.1"), "is no URL"),
            (run(loading.url), "still loading"),
            (run(service.url, "other"), "only scripted"),
            (run(f"{service.url}/nowhere"), "no such service"),
        ]
    for (status, lines), words in cases:
        assert status == 1
        assert len(lines) == 1
        assert words in lines[0]


def test_a_first_word_that_comes_too_late_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(selftest, "FIRST_WORD_SECONDS", 0.0)
    with live(scripted(LONG, context_window=2**16), **GOOD) as service:
        assert not selftest.run(selftest.Service(f"{service.url}/v1", "scripted", "x"))
    assert "RAGFlow waits" in wrong(capsys.readouterr().out.splitlines())["adding it"]


def test_the_environment_file_holds_settings_that_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line for line in (FOLDER / "ragflow.env").read_text().splitlines() if line and not line.startswith("#")]
    for name, _, value in (line.partition("=") for line in lines):
        monkeypatch.setenv(name, value)
    settings = parse([])
    assert (settings.default_max_tokens, settings.max_batch_size) == (1024, 64)
    assert settings.served_names == ("qwen3-4b-local",)
    assert not settings.thinking
    assert settings.host == "0.0.0.0"
    assert len(lines) == len(settings.model_fields_set)


def test_the_guide_names_what_there_is() -> None:
    guide = (FOLDER / "README.md").read_text()
    for path in ("deploy/ragflow/ragflow.env", "deploy/ragflow/selftest.py", "deploy/tmux.sh", "deploy/grafana"):
        assert path in guide
        assert Path(ROOT, path).exists()
