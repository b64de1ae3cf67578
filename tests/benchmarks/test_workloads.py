"""Laws of the workloads and of prompt files: lengths, shared and distinct text, and what is refused."""

from dataclasses import replace
from pathlib import Path
from statistics import median

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.prompts import read
from benchmarks.words import LANGUAGES
from benchmarks.workloads import (
    CITATION_GUIDE,
    CONVERSATIONS,
    EXTRACTION_GUIDE,
    INSTRUCTION,
    TURNS,
    WORKLOADS,
    Job,
    Writer,
    chat_and_turn,
    digest,
    extraction,
    question,
    retrieval_chat,
    uniform,
)

ENGLISH = LANGUAGES["en"]


def said(job: Job) -> str:
    return "\n\n".join(message["content"] for message in job.messages)


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_the_same_seed_draws_the_same_jobs(name: str) -> None:
    same, again, other = (digest(WORKLOADS[name].draw(20, seed=seed)) for seed in (3, 3, 4))
    assert same == again != other


@pytest.mark.parametrize("name", sorted(WORKLOADS.keys() - {"rag-quote"}))
def test_a_prompt_has_the_words_its_length_says(name: str) -> None:
    for job in WORKLOADS[name].draw(20, seed=0):
        serials = 1
        assert len(said(job).split()) == job.prompt_tokens + serials


def test_mixed_64_is_the_workload_that_published_figures_use() -> None:
    jobs = WORKLOADS["mixed-64"].draw(64, seed=0)
    assert sum(job.prompt_tokens for job in jobs) == 99_754
    assert sum(job.max_tokens for job in jobs) == 8_668


def test_rag_40_is_the_workload_that_published_figures_use() -> None:
    jobs = WORKLOADS["rag-40"].draw(40, seed=0)
    assert {job.prompt_tokens for job in jobs} == {4853}
    assert sum(job.max_tokens for job in jobs) == 7_916
    assert all(64 <= job.max_tokens <= 320 for job in jobs)


def test_ragflow_chats_share_their_instruction_alone_though_all_end_with_the_same_guide() -> None:
    jobs = WORKLOADS["ragflow-chat"].draw(600, seed=0)
    assert median(job.prompt_tokens for job in jobs) == pytest.approx(4853, abs=20)
    systems = [job.messages[0]["content"].split() for job in jobs[:20]]
    same = [len(set(words)) == 1 for words in zip(*systems, strict=False)]
    assert same.index(False) == INSTRUCTION
    assert len({" ".join(system[-CITATION_GUIDE:]) for system in systems}) == 1


@given(serial=st.integers(0, 100_000))
def test_a_turn_of_a_conversation_continues_the_turn_before(serial: int) -> None:
    [job] = WORKLOADS["conversations"].draw(1, seed=0, first=serial)
    [later] = WORKLOADS["conversations"].draw(1, seed=0, first=serial + CONVERSATIONS)
    continues = later.messages[: len(job.messages)] == job.messages
    assert continues == (later.conversation == job.conversation)
    assert continues == (chat_and_turn(serial)[1] < TURNS - 1)


def test_conversations_that_go_on_at_once_share_their_instruction_alone() -> None:
    jobs = WORKLOADS["conversations"].draw(CONVERSATIONS, seed=0)
    assert len({job.conversation for job in jobs}) == CONVERSATIONS
    assert len({job.messages[0]["content"] for job in jobs}) == 1
    assert len({job.messages[1]["content"].split()[0] for job in jobs}) == CONVERSATIONS


def test_ragflow_ingestion_shares_its_guide() -> None:
    systems = [job.messages[0]["content"] for job in WORKLOADS["ragflow-ingest"].draw(20, seed=0)]
    assert len(set(systems)) == 1
    assert len(systems[0].split()) == EXTRACTION_GUIDE


def test_levels_ask_for_the_same_lengths_in_other_words() -> None:
    first, second = (WORKLOADS["short"].draw(30, seed=0, first=first) for first in (0, 30))
    assert [job.max_tokens for job in first] == [job.max_tokens for job in second]
    assert [job.prompt_tokens for job in first] == [job.prompt_tokens for job in second]
    assert len({said(job) for job in first + second}) == 60


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(1, 30))
def test_prompts_are_distinct_however_short(one: int, other: int, words: int) -> None:
    assert (question(Writer(ENGLISH, 0, one), words) == question(Writer(ENGLISH, 0, other), words)) == (one == other)


def test_chinese_text_is_of_chinese_words() -> None:
    jobs = replace(WORKLOADS["short"], language=LANGUAGES["zh"]).draw(5, seed=0)
    for job in jobs:
        serial, _, text = said(job).partition(". ")
        assert serial == str(job.serial)
        assert all("\u4e00" <= character <= "\u9fff" for character in text)


def test_no_word_is_listed_twice() -> None:
    for language in LANGUAGES.values():
        assert len(set(language.words)) == len(language.words)


@pytest.mark.parametrize("shape", [retrieval_chat, extraction])
def test_a_shape_refuses_fewer_words_than_its_constant_parts(shape: type) -> None:
    with pytest.raises(ValueError, match="tokens of prompt"):
        shape(Writer(ENGLISH, 0, 0), 1500)


def test_a_digest_names_texts_and_lengths() -> None:
    jobs = WORKLOADS["short"].draw(3, seed=0)
    assert digest(jobs) != digest([*jobs[:2], replace(jobs[2], max_tokens=1)])
    assert digest(jobs) != digest([jobs[1], jobs[0], jobs[2]])


def write(folder: Path, text: str) -> Path:
    file = folder / "prompts"
    file.write_text(text)
    return file


def test_json_lines_hold_prompts_or_messages(tmp_path: Path) -> None:
    lines = '{"prompt": "a", "max_tokens": 7}\n\n{"messages": [{"role": "system", "content": "b"}]}\n'
    source = read(write(tmp_path, lines), uniform(9, 9), keep_lengths=True)
    jobs = {said(job): job for job in source.draw(2, seed=0)}
    assert jobs["a"].messages == ({"role": "user", "content": "a"},)
    assert jobs["a"].max_tokens == 7
    assert jobs["b"].messages == ({"role": "system", "content": "b"},)
    assert jobs["b"].max_tokens == 9


def test_share_gpt_asks_what_stands_before_the_first_answer_and_its_length(tmp_path: Path) -> None:
    talk = [
        {"from": "system", "value": "Be kind."},
        {"from": "human", "value": "Hello there"},
        {"from": "gpt", "value": "x" * 40},
        {"from": "human", "value": "More"},
    ]
    unanswered = [{"from": "human", "value": "Anyone?"}]
    file = write(tmp_path, orjson.dumps([{"conversations": talk}, {"conversations": unanswered}]).decode())
    (job,) = read(file, uniform(9, 9), keep_lengths=True).draw(1, seed=0)
    assert [message["role"] for message in job.messages] == ["system", "user"]
    assert job.messages[1]["content"] == "Hello there"
    assert job.max_tokens == 10
    assert read(file, uniform(9, 9), keep_lengths=False).draw(1, seed=0)[0].max_tokens == 9


def test_a_prompt_file_is_sent_in_its_order_and_then_again(tmp_path: Path) -> None:
    lines = "\n".join(orjson.dumps({"prompt": str(number)}).decode() for number in range(4))
    source = read(write(tmp_path, lines), uniform(1, 500), keep_lengths=True)
    jobs = source.draw(3, seed=2) + source.draw(3, seed=2, first=3)
    assert [said(job) for job in jobs] == ["0", "1", "2", "3", "0", "1"]
    assert [job.serial for job in jobs] == list(range(6))
    assert source.draw(3, seed=2) == jobs[:3] != source.draw(3, seed=3)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "no prompts"),
        ("[]", "no prompts"),
        ('{"prompt": "a"}\n{"prompt": 3}', "line 2"),
        ('{"text": "a"}', "line 1"),
        ('{"prompt": "a", "max_tokens": 0}', "line 1"),
        ('{"messages": []}', "line 1"),
        ("hello", "line 1"),
        ('[{"conversations": [{"from": "bot", "value": "a"}]}]', "ShareGPT"),
        ("[3]", "ShareGPT"),
    ],
)
def test_a_file_that_is_neither_format_is_refused_with_the_place(tmp_path: Path, text: str, place: str) -> None:
    with pytest.raises(ValueError, match=place):
        read(write(tmp_path, text), uniform(1, 1), keep_lengths=True)
