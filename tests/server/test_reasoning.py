"""Laws of telling thoughts from answers."""

import sys
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from server.output.answer import ContentScanner
from server.output.model_format import format_of
from server.output.reasoning import ReasoningSplitter, ThoughtState
from tests.server.test_text import split, up_to_first_stop

TEXTS = st.lists(st.sampled_from(["<think>", "</think>", "<", "</th", "\n", "a", " ", "ink>"])).map("".join)
CUTS = st.lists(st.integers(0, 60))


def parts(pieces: list[str], started: bool = False) -> tuple[str, str]:
    """The reasoning and the content of an answer in pieces."""
    splitter = ReasoningSplitter(started=started)
    out = [part for piece in pieces for part in splitter.push(piece)] + splitter.flush()
    assert all(text for _, text in out)
    assert [kind for kind, _ in out] == sorted((kind for kind, _ in out), reverse=True)
    return "".join(t for kind, t in out if kind == "reasoning"), "".join(t for kind, t in out if kind == "content")


def by_definition(text: str, started: bool) -> tuple[str, str]:
    if not text.startswith("<think>") and not started:
        return "", text
    thought, _, content = text.removeprefix("<think>").partition("</think>")
    return thought.strip("\n"), content.lstrip("\n")


@given(TEXTS, CUTS, st.booleans())
def test_the_split_is_that_of_the_whole_text_however_it_was_cut(text: str, cuts: list[int], started: bool) -> None:
    assert parts(split(text, cuts), started) == by_definition(text, started)


STOPS = st.lists(st.sampled_from(["a", "\n", " a", "<", "</think>", "<think>", "ink>a"]), min_size=1, max_size=3)


@given(TEXTS, CUTS, st.booleans(), STOPS)
def test_stop_strings_are_found_in_content_alone_however_the_text_was_cut(
    text: str, cuts: list[int], started: bool, stops: list[str]
) -> None:
    assume(not "<think>".startswith(text))  # what may still begin a thought is not searched
    scanner = ContentScanner(stops, ReasoningSplitter(started=started))
    passed, stopped, fed = "", False, 0
    for piece in split(text, cuts):
        safe, stopped = scanner.push(piece)
        passed, fed = passed + safe, fed + len(piece)
        assert stopped or len(passed.encode()) + scanner.held == len(text[:fed].encode())
        if stopped:
            break
    reasoning, content = by_definition(text, started)
    kept, ends = up_to_first_stop(content, stops)
    assert stopped == ends
    assert by_definition(passed + scanner.flush() * (not stopped), started) == (reasoning, kept)


@pytest.mark.parametrize(
    ("text", "started", "expected"),
    [
        ("<think>\nhm\n</think>\n\nYes.", False, ("hm", "Yes.")),
        ("<think>\n\n</think>\n\nYes.", False, ("", "Yes.")),
        ("hm\n</think>\n\nYes.", True, ("hm", "Yes.")),
        ("<think>\nhm\n</think>\n\nYes.", True, ("hm", "Yes.")),
        ("Yes <think>no</think>", False, ("", "Yes <think>no</think>")),
        ("<think>a</think>b<think>c</think>d", False, ("a", "b<think>c</think>d")),
        ("<think>a\n\nb", False, ("a\n\nb", "")),
        ("<think>a</thi", False, ("a</thi", "")),
        ("<think>a < b <think> c</think>d", False, ("a < b <think> c", "d")),
        ("\n\nYes.\n", False, ("", "\n\nYes.\n")),
        ("<thi", False, ("", "<thi")),
        ("<thi", True, ("<thi", "")),
        ("", True, ("", "")),
    ],
)
def test_cases(text: str, started: bool, expected: tuple[str, str]) -> None:
    assert parts([text], started) == expected
    assert parts(list(text), started) == expected


def test_other_tags() -> None:
    splitter = ReasoningSplitter("[THINK]", "[/THINK]")
    assert splitter.push("[THINK]a[/THINK]b") == [("reasoning", "a"), ("content", "b")]


@given(TEXTS, CUTS)
def test_content_is_held_back_by_less_than_a_tag(text: str, cuts: list[int]) -> None:
    splitter, seen, out = ReasoningSplitter(), "", ""
    for piece in split("a" + text, cuts):
        seen += piece
        out += "".join(text for _, text in splitter.push(piece))
        assert out == seen


@given(TEXTS, CUTS)
def test_no_part_of_the_closing_tag_is_taken_for_a_thought(text: str, cuts: list[int]) -> None:
    splitter, seen, thought = ReasoningSplitter(started=True), "", ""
    for piece in split("a" + text, cuts):
        seen += piece
        thought += "".join(text for kind, text in splitter.push(piece) if kind == "reasoning")
        assert seen.partition("</think>")[0].startswith(thought)
        # Held back is what may yet become the tag, and the newlines before it, but not one character more.
        if "</think>" not in seen:
            starts = ["</think>"[:n] for n in range(8) if seen.endswith("</think>"[:n])]
            assert thought == seen.removesuffix(max(starts, key=len)).rstrip("\n")


@pytest.mark.parametrize("unit", ["\n", "</think", "<think>", "<think>\n</think>", "a"])
@pytest.mark.parametrize("size", [1, 7, 10**9])
def test_work_grows_with_the_length_of_the_text_and_no_faster(unit: str, size: int) -> None:
    def run(repeats: int) -> None:
        text = "<think>" + unit * repeats
        parts([text[at : at + size] for at in range(0, len(text), size)] if size < len(text) else [text])

    assert calls_in(lambda: run(2000)) <= 2.1 * calls_in(lambda: run(1000)) + 100


def calls_in(function: Any) -> int:
    """How many functions, Python's and C's, run while this one does."""
    calls = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.parametrize(
    ("end", "state"),
    [
        ("<think>\n", ThoughtState.OPENED),
        ("<think>", ThoughtState.OPENED),
        ("<think>\n\n</think>\n\n", ThoughtState.CLOSED),
        ("</think>", ThoughtState.CLOSED),
        ("", ThoughtState.FREE),
        ("<think> is a tag", ThoughtState.FREE),
    ],
)
def test_what_a_prompt_has_done_about_a_thought_is_read_from_its_end(end: str, state: ThoughtState) -> None:
    prompt = f"<|im_start|>user\n<think>a</think>b<think><|im_end|>\n<|im_start|>assistant\n{end}"
    thinking, plain = (format_of(template, (), lambda text: (0,)) for template in ("<think>", ""))
    assert thinking.thought_after(prompt) is state
    assert plain.thought_after(prompt) is ThoughtState.UNKNOWN
    assert state.to_come is (state in (ThoughtState.OPENED, ThoughtState.FREE))
