"""Laws of the way from text to tokens and back."""

import json
import re
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.decoders import ByteFallback, Fuse, Replace, Sequence, Strip
from tokenizers.models import BPE
from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

import server.model.text
from batching.errors import ModelError
from batching.progress import Progress
from batching.types import TokenLogprob
from server.http.errors import ApiError
from server.model.loader import ModelLoader
from server.model.text import BREAK, CUT, WORDS, Text, can_be_cut, parts_of
from server.openai.logprobs import chat_logprobs
from server.output.answer import StopScanner
from server.output.detokenize import MAX_HELD, Detokenizer, Vocabulary
from server.settings import parse
from tests.live import BYTES, END, QUESTION, byte_tokenizer, tokens_of

LETTERS = st.text("ab\n", max_size=20)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4) | st.text("ab", min_size=5, max_size=15), max_size=4)
CUTS = st.lists(st.integers(0, 20))


Whole = TypeVar("Whole", str, list[int])


def prompt(text: Text, messages: Any, *, thinks: bool = False) -> tuple[int, ...]:
    return text.encode(text.render(messages, thinks=thinks))


def split(whole: Whole, cuts: list[int]) -> list[Whole]:
    """The whole in pieces, some of them empty."""
    places = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    return [whole[start:end] for start, end in pairwise(places)]


def scan(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    scanner, text = StopScanner(stops), ""
    for piece in pieces:
        safe, stopped = scanner.push(piece)
        text += safe
        if stopped:
            return text, True
    return text + scanner.flush(), False


def up_to_first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The law: read a character at a time, the answer ends where the first stop string to be complete starts.

    Of several that are complete at the same character the longest counts.
    """
    for end in range(len(text) + 1):
        complete = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(complete)], True
    return text, False


@given(LETTERS, CUTS, STOPS)
def test_an_answer_ends_where_the_first_complete_stop_string_starts_however_the_text_was_cut(
    text: str, cuts: list[int], stops: list[str]
) -> None:
    assert scan(split(text, cuts), stops) == up_to_first_stop(text, stops)


@given(LETTERS, CUTS, STOPS)
def test_no_stop_string_nor_the_start_of_one_gets_out(text: str, cuts: list[int], stops: list[str]) -> None:
    scanner, out, seen = StopScanner(stops), "", ""
    for piece in split(text, cuts):
        safe, stopped = scanner.push(piece)
        out, seen = out + safe, seen + piece
        assert seen.startswith(out)
        assert not any(stop in out for stop in stops)
        if stopped:
            return
        # Held back is what may yet become a stop string, and not one character more.
        starts = [stop[:n] for stop in stops for n in range(1, len(stop)) if seen.endswith(stop[:n])]
        assert seen.removeprefix(out) == max(starts, key=len, default="")


def test_a_character_costs_the_same_however_many_and_long_the_stop_strings_are() -> None:
    """Calls are counted. The text is held back for the first stop string, and almost begins the others everywhere."""

    def calls(length: int, count: int) -> int:
        stops = ["a" * (length - 1) + "b", *("b" + "a" * (length - 2 - n) + "c" for n in range(count - 1))]
        scanner, counted = StopScanner(stops), 0

        def count_call(frame: FrameType, event: str, called: object) -> None:
            nonlocal counted
            counted += event in ("call", "c_call")

        text = "a" * length * 2
        sys.setprofile(count_call)
        try:
            for char in text:
                scanner.push(char)
        finally:
            sys.setprofile(None)
        return counted // len(text)

    few = calls(length=8, count=1)
    assert calls(length=256, count=1) <= few + 1
    assert calls(length=256, count=16) <= few + 1 + 15, "one search for each"


def test_without_stop_strings_everything_passes_at_once() -> None:
    scanner = StopScanner([])
    assert scanner.push("text") == ("text", False)
    assert scanner.flush() == ""


def detokenized(tokenizer: Tokenizer, pieces: list[list[int]]) -> list[str]:
    detokenizer = Detokenizer(Vocabulary(tokenizer))
    return [detokenizer.push(piece) for piece in pieces]


def check_text_survives(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = detokenized(tokenizer, split(ids, cuts))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def check_any_ids(tokenizer: Tokenizer, ids: list[int], cuts: list[int]) -> None:
    """The pieces are the whole's start; what is left out ends with a character that is not finished."""
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    out = "".join(detokenized(tokenizer, split(ids, cuts)))
    assert whole.startswith(out)
    assert out == whole or whole.endswith("\ufffd")


@cache
def byte_fallback() -> Vocabulary:
    """As SentencePiece's vocabularies are: words that begin with a mark for a space, and a token for each byte."""
    words = ["<unk>", "▁", "▁the", "the", "▁a", "a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = BPE({word: n for n, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = Sequence([Replace("▁", " "), ByteFallback(), Fuse(), Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<s>"])
    return Vocabulary(tokenizer)


def bytes_tokens(text: str) -> list[int]:
    return [7 + byte for byte in text.encode()]


PIECES = st.lists(st.integers(1, 6).map(lambda word: [word]) | st.sampled_from("é€😀").map(bytes_tokens))


@given(PIECES, PIECES, CUTS)
def test_text_of_words_and_bytes_survives_being_cut(
    before: list[list[int]], pieces: list[list[int]], cuts: list[int]
) -> None:
    after, ids = ([token for piece in part for token in piece] for part in (before, pieces))
    detokenizer = Detokenizer(byte_fallback(), after=after)
    whole = byte_fallback().decode([2, *after, *ids]) if after else byte_fallback().decode(ids)
    text_before = byte_fallback().decode([2, *after]) if after else ""
    assert text_before + "".join(map(detokenizer.push, split(ids, cuts))) == whole


WORDS_AND_BYTES = st.lists(
    st.sampled_from([1, 2, 3, 4, *bytes_tokens("é中A "), *bytes_tokens("é😀")[2:4]]), max_size=12
)


@given(WORDS_AND_BYTES, WORDS_AND_BYTES, CUTS)
def test_whatever_bytes_are_between_words_each_word_is_there_once(
    after: list[int], ids: list[int], cuts: list[int]
) -> None:
    vocabulary = byte_fallback()
    found = "".join(map(Detokenizer(vocabulary, after=after).push, split(ids, cuts)))
    expected = b"".join(map(vocabulary.bytes_of, ids)).decode(errors="replace")
    assert re.sub("[^the]", "", found) == re.sub("[^the]", "", expected)


@pytest.mark.parametrize("vocabulary", [Vocabulary(BYTES.backend_tokenizer), byte_fallback()])
def test_halves_of_characters_without_end_are_let_out(vocabulary: Vocabulary) -> None:
    half = next(token for token in range(270) if vocabulary.bytes_of(token) == b"\xe4")
    detokenizer = Detokenizer(vocabulary)
    out = [detokenizer.push([half]) for _ in range(100)]
    assert len("".join(out)) >= 100 - MAX_HELD
    assert set("".join(out)) == {"\ufffd"}


def test_the_bytes_of_a_token_are_its_own() -> None:
    vocabulary = byte_fallback()
    assert [vocabulary.bytes_of(token) for token in (2, 3, 7 + 0xE4)] == [b" the", b"the", b"\xe4"]


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd") | st.sampled_from("é€😀👩‍👧"))
ANY_BYTES = st.lists(st.integers(0, END), max_size=30)


@given(ANY_TEXT, CUTS)
def test_text_survives_being_cut_inside_its_characters(text: str, cuts: list[int]) -> None:
    check_text_survives(BYTES.backend_tokenizer, text, cuts)


@given(ANY_BYTES, CUTS)
def test_any_tokens_become_what_they_decode_to_but_for_an_unfinished_character(ids: list[int], cuts: list[int]) -> None:
    check_any_ids(BYTES.backend_tokenizer, ids, cuts)


def test_a_piece_comes_with_the_token_that_completes_it() -> None:
    tokenizer = BYTES.backend_tokenizer
    ids = tokenizer.encode("aé😀").ids
    assert detokenized(tokenizer, [[token] for token in ids]) == ["a", "", "é", "", "", "", "😀"]


def with_byte_tokens(decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    """A vocabulary like SentencePiece's: a few letters, spaces as `▁`, and a token for each byte of all else."""
    letters = ["<unk>", *"▁ahet", "▁t", "▁th", "▁the"]
    vocab = {piece: n for n, piece in enumerate([*letters, *(f"<0x{byte:02X}>" for byte in range(256))])}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template="", eos_token="<unk>")


SPACES = {
    "stripped": [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)],
    "metaspace": [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()],
}


@pytest.mark.parametrize("decoder", SPACES.values(), ids=SPACES)
def test_tokens_of_bytes_and_of_words_stand_for_their_true_bytes(decoder: list[decoders.Decoder]) -> None:
    text = Text(with_byte_tokens(decoders.Sequence(decoder)))

    @given(st.text(st.sampled_from("the a中é😀<0xE4>\n"), min_size=1).filter(lambda words: words == words.strip()))
    def law(words: str) -> None:
        ids = text.encode(words)
        assert b"".join(map(text.vocabulary.bytes_of, ids)) == b" " + words.encode()
        told = chat_logprobs(text, [TokenLogprob(token, -1.0, ()) for token in ids])
        assert told is not None
        for entry in told["content"]:
            assert entry["token"] == bytes(entry["bytes"]).decode(errors="replace")

    law()
    assert [text.vocabulary.bytes_of(token) for token in text.encode("中")] == [b" ", b"\xe4", b"\xb8", b"\xad"]


@pytest.mark.parametrize("byte_level", [True, False])
def test_tags_of_thoughts_and_calls_are_text_even_where_the_tokenizer_flags_them(byte_level: bool) -> None:
    made = byte_tokenizer() if byte_level else with_byte_tokens(decoders.Sequence(SPACES["stripped"]))
    made.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<tool_call>", "<|end|>"]})
    text = Text(made)
    ids = text.encode("<think>a</think><|end|><tool_call>")
    shown, all_of_it = (text.detokenizer(special=special).push(ids).replace(" ", "") for special in (False, True))
    assert (shown, all_of_it) == ("<think>a</think><tool_call>", "<think>a</think><|end|><tool_call>")


def test_what_looks_like_a_token_of_a_byte_and_is_none_stands_for_its_text() -> None:
    text = Text(with_byte_tokens(decoders.Fuse()))  # which leaves every piece as it is
    [*_, token] = text.encode("é")
    assert text.vocabulary.bytes_of(token) == b"<0xA9>"


@cache
def demo() -> Text:
    return ModelLoader(parse([]), Progress()).text()


@pytest.mark.model
@given(st.text("aB7 \n.é€ßЖщ中文字日本語한😀👩‍👧"), CUTS)  # its vocabulary lacks bytes that rarer characters need
def test_text_survives_the_demo_tokenizer(text: str, cuts: list[int]) -> None:
    check_text_survives(demo()._tokenizer, text, cuts)


@pytest.mark.model
@given(st.lists(st.integers(0, 49151), max_size=30), CUTS)
def test_any_tokens_of_the_demo_tokenizer_become_what_they_decode_to(ids: list[int], cuts: list[int]) -> None:
    check_any_ids(demo()._tokenizer, ids, cuts)


@pytest.mark.model
def test_the_demo_model_is_asked_in_its_own_words() -> None:
    text = demo()._tokenizer.decode(list(prompt(demo(), QUESTION)), skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def decoded(ids: tuple[int, ...], text: Text | None = None) -> str:
    """A prompt with its special tokens."""
    tokenizer = text._tokenizer if text else BYTES.backend_tokenizer
    return tokenizer.decode(list(ids), skip_special_tokens=False)


def test_a_prompt_ends_where_the_answer_starts() -> None:
    text = Text(BYTES)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a\x00é😀"}]
    assert decoded(prompt(text, messages)) == "<system>Be kind.<|end|><user>a\x00é😀<|end|><assistant>"
    assert decoded(prompt(text, messages, thinks=True)).endswith("<assistant><think>")
    assert text.stop_token_ids == {END}


def test_a_prompt_is_read_whole_whatever_its_tokenizer_was_last_used_for(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=20)
    tokenizer.save_pretrained(tmp_path)
    assert Text.load(str(tmp_path)).encode("no more, no less") == tuple(tokens_of("no more, no less"))


WORDS_AND_SPACE = st.lists(
    st.sampled_from(["a", "B", "1", "23", "_", ".", "'s", "é", "e\u0301", "\u0301", "中", "한", "😀"])
    | st.sampled_from([" ", " ", "\n", "\n", "\r\n", "\t", "\u3000", "\x85"])
    | st.sampled_from(["<|im_end|>", "</think>", BREAK]),
    max_size=30,
).map("".join)


def check_parts_have_the_tokens_of_the_whole(text: Text) -> None:
    assert text._can_be_cut

    @given(WORDS_AND_SPACE, st.integers(1, 4))
    def law(whole: str, size: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server.model.text, "PART", size)
            found = text.encode(whole)
        assert list(found) == text._tokenizer.encode(whole, add_special_tokens=False).ids

    law()
    long = "a few words, " * 1000
    assert len(parts_of(long)) > 10
    assert list(text.encode(long)) == text._tokenizer.encode(long, add_special_tokens=False).ids


@pytest.mark.model
def test_a_long_text_is_tokenized_in_parts_as_if_whole() -> None:
    check_parts_have_the_tokens_of_the_whole(demo())


def test_a_long_text_is_tokenized_in_parts_as_if_whole_by_a_thinking_model(thinking_tokenizer: str) -> None:
    check_parts_have_the_tokens_of_the_whole(Text.load(thinking_tokenizer))


def test_a_long_text_leaves_threads_to_other_texts(thinking_tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, long = Text.load(thinking_tokenizer), "a few words, " * 1000
    whole = text.encode(long)
    calls: list[list[str]] = []

    class Noting:
        def encode_batch_fast(self, parts: list[str], *, add_special_tokens: bool) -> Any:
            calls.append(parts)
            return tokenizer.encode_batch_fast(parts, add_special_tokens=add_special_tokens)

    tokenizer = text._tokenizer
    monkeypatch.setattr(text, "_tokenizer", Noting())
    monkeypatch.setattr(server.model.text, "TOGETHER", 5)
    assert text.encode(long) == whole
    assert [part for parts in calls for part in parts] == parts_of(long)
    assert max(map(len, calls)) == 5


def with_words(splitter: pre_tokenizers.PreTokenizer, *tokens: AddedToken) -> Tokenizer:
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠĠ"]
    ids = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(ids, [("Ġ", "Ġ")]))
    tokenizer.pre_tokenizer = splitter
    tokenizer.add_tokens(list(tokens))
    return tokenizer


@pytest.mark.parametrize("pattern", sorted(WORDS))
@given(text=WORDS_AND_SPACE)
def test_known_words_end_where_a_text_is_cut(pattern: str, text: str) -> None:
    splitter = pre_tokenizers.Split(Regex(pattern), "isolated")
    assert can_be_cut(with_words(splitter))
    places = [0, *(cut.end() for cut in CUT.finditer(text)), len(text)]
    parts = [text[start:end] for start, end in pairwise(places)]
    words = [word for part in parts for word, _ in splitter.pre_tokenize_str(part)]
    assert words == [word for word, _ in splitter.pre_tokenize_str(text)]


BY_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    "tokenizer",
    [
        with_words(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BY_WORDS])),  # SmolLM2
        with_words(BY_WORDS, AddedToken("  ")),  # OLMo
        with_words(BY_WORDS, AddedToken("a")),
    ],
)
@given(text=WORDS_AND_SPACE)
@example(text="  1")
@example(text="  a")
def test_a_run_of_spaces_is_not_cut_because_what_is_after_it_may_not_be_of_its_word(
    tokenizer: Tokenizer, text: str
) -> None:
    assert can_be_cut(tokenizer)
    places = [0, *(cut.end() for cut in CUT.finditer(text)), len(text)]
    parts = tokenizer.encode_batch([text[start:end] for start, end in pairwise(places)], add_special_tokens=False)
    assert [token for part in parts for token in part.ids] == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "tokenizer",
    [
        with_words(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),  # all text is one word
        with_words(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        with_words(pre_tokenizers.Metaspace()),
        with_words(pre_tokenizers.Split(Regex(r"\w+\s*"), "isolated")),
        with_words(pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), BY_WORDS])),
        with_words(BY_WORDS, AddedToken("<end of turn>")),
        with_words(BY_WORDS, AddedToken("\nHuman")),
        with_words(BY_WORDS, AddedToken("Human: ")),
        with_words(BY_WORDS, AddedToken("<one>"), AddedToken("<mask>", rstrip=True)),
        with_words(BY_WORDS, AddedToken("User", lstrip=True)),
    ],
)
def test_a_text_is_not_cut_where_its_tokens_might_reach_across(tokenizer: Tokenizer) -> None:
    assert not can_be_cut(tokenizer)


def test_white_space_to_the_left_of_a_token_is_in_its_part() -> None:
    assert can_be_cut(with_words(BY_WORDS, AddedToken("<mask>", lstrip=True)))


def test_what_the_template_refuses_has_its_own_words() -> None:
    with pytest.raises(ApiError) as caught:
        prompt(Text(BYTES), [{"role": "ghost", "content": "boo"}])
    assert caught.value.message == "The model's chat template refuses the messages: unknown role."


def test_a_folder_without_a_tokenizer_or_a_template_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^there is no tokenizer \(tokenizer.json\) in .*$") as empty:
        Text.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="no usable tokenizer"):
        Text.load(str(tmp_path))
    bare = type(BYTES)(tokenizer_object=BYTES.backend_tokenizer, eos_token="<|end|>")
    bare.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no chat template") as untold:
        Text.load(str(tmp_path))
    assert all("\n" not in str(caught.value) for caught in (empty, untold))


def test_a_folder_that_lost_its_vocabulary_is_refused(tmp_path: Path) -> None:
    Qwen3Config().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": BYTES.chat_template}))
    with pytest.raises(ModelError, match="there is no tokenizer"):
        Text.load(str(tmp_path))


def test_what_a_tokenizer_in_sentencepiece_s_format_needs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    LlamaConfig().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(ModelError, match="needs two more packages: pip install sentencepiece protobuf"):
        Text.load(str(tmp_path))


def test_a_saved_tokenizer_is_loaded_as_it_was(tmp_path: Path) -> None:
    BYTES.save_pretrained(tmp_path)
    assert prompt(Text.load(str(tmp_path)), QUESTION) == prompt(Text(BYTES), QUESTION)


def thought(folder: str, think: bool) -> str:
    text = Text.load(folder)
    messages = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Hi"}]
    return decoded(prompt(text, messages, thinks=think), text)


def test_thinking_off_adds_an_empty_thought(thinking_tokenizer: str) -> None:
    assert thought(thinking_tokenizer, False).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert thought(thinking_tokenizer, True).endswith("<|im_start|>assistant\n")


def test_the_system_message_is_kept(thinking_tokenizer: str) -> None:
    assert thought(thinking_tokenizer, False).startswith(
        "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nHi"
    )


def test_a_thinking_tokenizer_keeps_the_laws_of_detokenizing(thinking_tokenizer: str) -> None:
    tokenizer = Text.load(thinking_tokenizer)._tokenizer

    @given(ANY_TEXT, st.lists(st.integers(0, tokenizer.get_vocab_size() + 200), max_size=30), CUTS)
    def law(text: str, ids: list[int], cuts: list[int]) -> None:
        ids_of_text = tokenizer.encode(text, add_special_tokens=False).ids
        assert "".join(detokenized(tokenizer, split(ids_of_text, cuts))) == tokenizer.decode(ids_of_text)
        check_any_ids(tokenizer, ids, cuts)

    law()
