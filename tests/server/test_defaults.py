"""Laws of how tokens are chosen where a request does not say."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI

from batching.errors import ModelError
from batching.events import State
from batching.progress import Progress
from batching.types import Request
from server.__main__ import announce
from server.model.defaults import DEMO, FILE, Defaults, recommended
from server.model.loader import ModelLoader
from server.settings import parse
from tests.live import Live, live, scripted
from tests.server.test_app import remembering

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0.01, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(1, 100),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.1, 10),
}
PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
}


def chosen(request: Request) -> dict[str, float]:
    return {name: getattr(request.sampling, name) for name in VALUES}


@pytest.mark.parametrize("path", PATHS)
def test_a_request_has_what_it_says_and_the_model_s_defaults_for_the_rest(path: str) -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen))) as service, service.http() as http:

        @settings(max_examples=40)
        @given(st.fixed_dictionaries({}, optional=VALUES), st.fixed_dictionaries({}, optional=VALUES), st.booleans())
        def law(of_model: dict[str, Any], asked: dict[str, Any], null: bool) -> None:
            service.service.model = replace(service.model, defaults=Defaults(**of_model))
            nulls = dict.fromkeys(VALUES) if null else {}
            assert http.post(path, content=orjson.dumps(PATHS[path] | nulls | asked)).status_code == 200
            assert chosen(seen.pop()) == Defaults().model_dump() | of_model | asked

        law()


@pytest.mark.parametrize("greedy", [{"temperature": 0.0}, {"temperature": 0.001}, {"top_p": 0.0}])
def test_a_model_s_defaults_that_leave_no_choice_make_greedy_rows(greedy: dict[str, Any]) -> None:
    seen: list[Request] = []
    with live(scripted(remembering(seen)), defaults=Defaults(**greedy)) as service:
        service.chat()
        service.chat(temperature=0.5, top_p=0.5)
    assert [request.sampling.greedy for request in seen] == [True, False]


def folder_with(folder: Path, **values: Any) -> str:
    (folder / FILE).write_text(json.dumps(values))
    return str(folder)


def test_a_folder_s_own_file_is_followed_but_for_its_switch_and_its_length(tmp_path: Path) -> None:
    values = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.05}
    others = {"do_sample": False, "max_new_tokens": 7, "eos_token_id": [1, 2], "transformers_version": "4.51.0"}
    found = recommended(folder_with(tmp_path, **values, **others))
    assert found.model_dump() == values
    assert str(found) == "temperature 0.6, top_p 0.95, top_k 20, min_p 0.01, repetition_penalty 1.05"


def test_what_a_file_leaves_open_and_a_folder_without_one_have_openai_s_values(tmp_path: Path) -> None:
    assert recommended(str(tmp_path)) == Defaults()
    assert recommended(folder_with(tmp_path, temperature=None, top_k=-1, do_sample=True)) == Defaults()
    assert str(Defaults()) == "temperature 1, top_p 1"


def test_a_gguf_file_has_what_lies_beside_it(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.touch()
    assert recommended(str(model)) == Defaults()
    folder_with(tmp_path, temperature=0.7)
    assert recommended(str(model)) == recommended(str(tmp_path)) == Defaults(temperature=0.7)


@pytest.mark.parametrize(
    "text",
    [
        '{"top_p": 1.5}',
        '{"temperature": -1}',
        '{"temperature": "hot"}',
        '{"temperature": NaN}',
        '{"top_k": 1.5}',
        "{",
        "[]",
    ],
)
def test_a_file_that_cannot_be_followed_ends_the_start_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be used") as caught:
        recommended(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert "--generation-config openai" in str(caught.value)


def test_openai_s_values_are_to_be_had_whatever_the_folder_says(tmp_path: Path) -> None:
    model = folder_with(tmp_path, temperature=5, top_p=7)
    assert ModelLoader(parse(["--model", model, "--generation-config", "openai"]), Progress()).defaults() == Defaults()


def test_the_demo_model_comes_with_settings_of_its_own() -> None:
    assert ModelLoader(parse([]), Progress()).defaults() == DEMO == Defaults(temperature=0.2, top_p=0.5)


def told(service: Live) -> list[Any]:
    return [service.get(path).json()["sampling"] for path in ("/version", "/internal/state")]


def test_what_is_in_force_is_told_once_it_is_known(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "microbatch")
    with live(ready=False, defaults=DEMO, log_format="json") as service:
        service.loader.may_load.set()
        service.wait_state(State.READY)
        assert told(service) == [DEMO.model_dump()] * 2
        announce(service.model, 1)
    [facts] = [record.facts for record in caplog.records if hasattr(record, "facts")]
    assert facts["sampling"] == "temperature 0.2, top_p 0.5 by default"


def test_it_is_not_known_before_the_model_s_files_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with live() as service:
        monkeypatch.setattr(service.service, "model", None)
        assert told(service) == [None, None]


def test_a_response_says_which_values_it_was_made_with() -> None:
    with live(defaults=DEMO) as service, OpenAI(base_url=f"{service.url}/v1", api_key="x") as client:
        left = client.responses.create(model="scripted", input="Hi")
        set_ = client.responses.create(model="scripted", input="Hi", temperature=0.5, top_p=0.25)
    assert [(answer.temperature, answer.top_p) for answer in (left, set_)] == [(0.2, 0.5), (0.5, 0.25)]
