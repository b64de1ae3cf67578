"""Laws of the workload rag-quote: its pages, its questions, and that the passages asked for stand in the pages."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from batching.checkpoint import locate
from benchmarks.quotes import COUNT, PROMPT_TOKENS, WORDS_PER_TOKEN, question, questions
from benchmarks.run import Settings
from benchmarks.workloads import named
from server.settings import Settings as ServerSettings


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 8000))
@settings(max_examples=50)
def test_the_passage_asked_for_stands_in_its_page_once(seed: int, serial: int, tokens: int) -> None:
    found = question(seed, serial, tokens, 1.0)
    assert found.passage
    assert found.page.count(found.passage) == 1
    name = found.question.removeprefix("Quote the whole entry on ").removesuffix(", word for word.")
    paragraphs = found.page.split("\n\n")[1:]
    assert [text for text in paragraphs if name.lower() in text.lower()] == [found.passage]


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(200, 8000))
@settings(max_examples=50)
def test_a_page_has_about_the_words_asked_for(seed: int, serial: int, tokens: int) -> None:
    found = question(seed, serial, tokens, 1.0)
    longest = max(len(paragraph.split()) for paragraph in found.page.split("\n\n"))
    said = " ".join(message["content"] for message in found.messages()).split()
    assert abs(len(said) - tokens * WORDS_PER_TOKEN) <= 2 * longest


def test_the_same_arguments_ask_the_same_and_no_two_pages_are_alike() -> None:
    first = questions()
    assert first == questions()
    assert first[:10] == questions(10)
    pages = [messages[0]["content"] for messages in first + questions(seed=1)]
    assert len(set(pages)) == 2 * COUNT


@given(st.floats(0, 1), st.integers(1, 40))
def test_the_share_of_quotation_holds_for_the_first_questions_however_many(quotation: float, count: int) -> None:
    asked = [question(0, serial, 0, quotation) for serial in range(count)]
    assert sum(each.passage is not None for each in asked) == int(count * quotation)


def test_pages_do_not_depend_on_the_share_of_quotation() -> None:
    quoting, free = (questions(20, quotation=share) for share in (1.0, 0.0))
    assert [messages[0] for messages in quoting] == [messages[0] for messages in free]
    assert all(one[1] != other[1] for one, other in zip(quoting, free, strict=True))


@pytest.mark.parametrize("quotation", [-0.1, 1.1, float("nan")])
def test_a_share_of_quotation_outside_of_nothing_and_all_is_refused(quotation: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        questions(1, quotation=quotation)


@pytest.mark.parametrize("quotation", [None, 0.5])
def test_the_load_tool_asks_the_same_questions(quotation: float | None) -> None:
    source = Settings(url="", model="m", workload="rag-quote", quotation=quotation).source()
    jobs = source.draw(12, seed=3)
    expected = questions(12, seed=3, quotation=1.0 if quotation is None else quotation)
    assert [list(job.messages) for job in jobs] == expected
    assert {job.prompt_tokens for job in jobs} == {PROMPT_TOKENS}


def test_what_a_workload_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="--quotation"):
        named("short", "en", 0.5)
    with pytest.raises(ValueError, match="--language"):
        named("rag-quote", "zh", None)


def longest_prompt(folder: str) -> int:
    """In tokens, with the chat template, of both sorts of questions."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    asked = questions() + questions(quotation=0.0)
    return max(
        len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
        for messages in asked
    )


@pytest.mark.model
def test_prompts_leave_room_for_an_answer_in_the_window_of_the_demo_model() -> None:
    folder = locate(None, "auto", ServerSettings.model_fields["cache_dir"].default)
    assert PROMPT_TOKENS < longest_prompt(folder) <= 1700


def test_prompts_are_as_long_with_another_tokenizer(thinking_tokenizer: str) -> None:
    assert PROMPT_TOKENS < longest_prompt(thinking_tokenizer) <= 1700
