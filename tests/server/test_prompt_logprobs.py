"""Log probabilities of prompts: `echo` with `logprobs`, `max_tokens: 0`, and vLLM's `prompt_logprobs`."""

from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from batching.types import Request
from server.model.text import Text
from server.openai.completions import starts_of
from server.openai.endpoint import MAX_PROMPT_LOGPROBS
from tests.fakes import SCORED, prompt_logprob
from tests.live import BYTES, END, TEMPLATE, frames, live, scripted, tokens_of
from tests.server.test_app import error_of, remembering
from tests.server.test_choices import telling
from tests.server.test_completions import complete, echoing, logprobs_of, said

PROMPT = "é: {a}<|end|>b"
IDS = [*tokens_of("é: {a}"), END, *tokens_of("b")]
STARTS = [0, 0, 1, 2, 3, 4, 5, 6, 13]
WORDS = ["bytes:\\xc3", "bytes:\\xa9", ":", " ", "{", "a", "}", "<|end|>", "b"]


def word(token: int) -> str:
    data = Text(BYTES).vocabulary.bytes_of(token)
    return data.decode() if data.isascii() else "".join(["bytes:", *(f"\\x{byte:02x}" for byte in data)])


# Echo with logprobs


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", [PROMPT, IDS])
def test_an_echoed_prompt_is_told_with_its_log_probabilities(prompt: str | list[int], stream: bool) -> None:
    with live(telling("ok")) as service:
        response = complete(service, prompt, echo=True, logprobs=2, stream=stream)
        assert service.sample("microbatch_scored_prompt_tokens_total") == len(IDS)
    assert said(response, stream) == [PROMPT + "ok"]
    told = logprobs_of(response, stream)
    answer = [*tokens_of("ok"), END]
    assert told["tokens"] == [*WORDS, "o", "k", "<|end|>"]
    assert told["text_offset"] == [*STARTS, 14, 15, 16]
    assert told["token_logprobs"] == [None, *(-token / 8 for token in [*IDS[1:], *answer])]
    assert told["top_logprobs"][0] is None
    wanted = [prompt_logprob(token, 2).top for token in IDS[1:]]
    assert told["top_logprobs"][1 : len(IDS)] == [{word(token): value for token, value in top} for top in wanted]


@pytest.mark.parametrize("stream", [False, True])
def test_every_choice_of_every_prompt_is_told_for_itself(stream: bool) -> None:
    with live(scripted(echoing())) as service:
        response = complete(service, ["some", tokens_of("more words")], n=2, echo=True, logprobs=0, stream=stream)
    assert said(response, stream) == ["somere:some"] * 2 + ["more wordsre:more words"] * 2
    chunks = [response.json()] if not stream else frames(response)[:-1]
    for index, prompt in enumerate(["some"] * 2 + ["more words"] * 2):
        choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        told = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        assert [token for each in told for token in each["tokens"]] == list(prompt)
        assert [value for each in told for value in each["token_logprobs"]][:1] == [None]
        if stream:
            pieces = [choice["text"] for choice in choices if choice["logprobs"]]
            assert pieces == [prompt[at : at + SCORED] for at in range(0, len(prompt), SCORED)]


# No token at all


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0, 3])
@pytest.mark.parametrize("prompt", ["a", PROMPT])
def test_no_token_is_generated_where_none_is_wanted(prompt: str, logprobs: int | None, stream: bool) -> None:
    with live(telling("never")) as service:
        fields = {"stream_options": {"include_usage": True}} if stream else {}
        response = complete(service, prompt, echo=True, max_tokens=0, logprobs=logprobs, stream=stream, **fields)
        assert service.sample("microbatch_output_tokens_total") == 0
        assert service.wait_ended()[0].finish == "length"
    tokens = len(Text(BYTES).encode(prompt))
    if stream:
        *chunks, last, done = frames(response)
        assert done == "[DONE]"
        choices = [chunk["choices"][0] for chunk in chunks]
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
        assert "".join(choice["text"] for choice in choices) == prompt
    else:
        last = response.json()
        [choice] = last["choices"]
        assert (choice["text"], choice["finish_reason"]) == (prompt, "length")
        assert (choice["logprobs"] is None) == (logprobs is None)
        assert "prompt_logprobs" not in choice
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (tokens, 0)
    if logprobs is not None:
        told = logprobs_of(response, stream)
        assert {len(values) for values in told.values()} == {tokens}


def test_it_needs_echo_and_an_endpoint_that_has_it() -> None:
    with live(telling("x")) as service:
        for fields in ({}, {"echo": False}, {"prompt_logprobs": 1}):
            assert "echo" in error_of(complete(service, max_tokens=0, **fields), 400, None)["message"]
        assert error_of(complete(service, max_tokens=-1, echo=True), 400, None)["param"] == "max_tokens"
        assert error_of(service.chat(max_tokens=0), 400, None)["param"] == "max_tokens"
        assert not service.engine.batches


def test_a_prompt_that_generates_nothing_may_fill_the_window() -> None:
    with live(scripted(context_window=64)) as service:
        assert complete(service, "x" * 64, echo=True, max_tokens=0, logprobs=1).status_code == 200
        error_of(complete(service, "x" * 64, echo=True, max_tokens=1), 400, "context_length_exceeded")
        error_of(complete(service, "x" * 65, echo=True, max_tokens=0), 400, "context_length_exceeded")


# prompt_logprobs


def ranked(tokens: list[int], top: int) -> list[dict[str, Any] | None]:
    """What a scripted engine's answer says of these."""
    found: list[dict[str, Any] | None] = [None]
    for token in tokens[1:]:
        entry = prompt_logprob(token, top)
        shown = {token: (entry.logprob, 1)} | {other: (value, n) for n, (other, value) in enumerate(entry.top, 1)}
        found.append(
            {
                str(other): {"logprob": value, "rank": rank, "decoded_token": decoded(other)}
                for other, (value, rank) in shown.items()
            }
        )
    return found


def decoded(token: int) -> str:
    return Text(BYTES).vocabulary.bytes_of(token).decode(errors="replace")


@pytest.mark.parametrize("top", [0, 1, 3])
@pytest.mark.parametrize("echo", [False, True])
def test_a_completion_tells_each_prompt_with_its_choices(top: int, echo: bool) -> None:
    with live(scripted("ok")) as service:
        answer = complete(service, ["abcd", "e"], n=2, prompt_logprobs=top, echo=echo).json()
    for choice, prompt in zip(answer["choices"], ["abcd"] * 2 + ["e"] * 2, strict=True):
        assert choice["prompt_logprobs"] == ranked(tokens_of(prompt), top)
        assert choice["text"] == (prompt if echo else "") + "ok"
        assert choice["logprobs"] is None


@pytest.mark.parametrize("top", [0, 2])
def test_a_chat_tells_its_prompt_once_beside_its_choices(top: int) -> None:
    with live(scripted("ok")) as service:
        response = service.chat(n=2, prompt_logprobs=top, logprobs=False)
        assert service.sample("microbatch_scored_prompt_tokens_total") == response.json()["usage"]["prompt_tokens"]
    answer = response.json()
    rendered = [*tokens_of("<user>Hi"), END, *tokens_of("<assistant>")]
    assert answer["prompt_logprobs"] == ranked(rendered, top)
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["ok", "ok"]
    assert all("prompt_logprobs" not in choice for choice in answer["choices"])


@pytest.mark.parametrize(("logprobs", "prompt_logprobs"), [(0, 3), (3, 0), (2, 2)])
def test_both_ways_of_asking_get_what_each_asked_for(logprobs: int, prompt_logprobs: int) -> None:
    with live(scripted("ok")) as service:
        response = complete(service, "abc", echo=True, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    [choice] = response.json()["choices"]
    assert choice["prompt_logprobs"] == ranked(tokens_of("abc"), prompt_logprobs)
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [max(logprobs, 1)] * 2  # with its own


def test_it_has_a_bound_is_not_streamed_and_is_not_told_unasked() -> None:
    with live(scripted("ok")) as service:
        for ask in (service.chat, lambda **fields: complete(service, **fields)):
            for wrong in (-1, 21, True, "1", 1.5):
                assert error_of(ask(prompt_logprobs=wrong), 400, None)["param"] == "prompt_logprobs"
            for number in (0, 1):
                error = error_of(ask(prompt_logprobs=number, stream=True), 400, None)
                assert "prompt_logprobs" in error["message"]
            assert b"prompt_logprobs" not in ask().content
            assert b"prompt_logprobs" not in ask(prompt_logprobs=None, stream=True).content
            assert "x-ignored-fields" not in ask(prompt_logprobs=2.0).headers


def test_a_row_that_nobody_asks_of_has_none_told() -> None:
    with live(telling("ok")) as service:
        complete(service, "abc", logprobs=5)
        complete(service, "abc", echo=True)
        service.chat(logprobs=True, top_logprobs=3)
        assert service.sample("microbatch_scored_prompt_tokens_total") == 0


def test_an_answer_holds_only_so_many_of_them() -> None:
    most = MAX_PROMPT_LOGPROBS // 4
    with live(scripted(context_window=most + 10)) as service:

        def ask(prompt: Any, **fields: Any) -> httpx2.Response:
            return complete(service, prompt, echo=True, max_tokens=0, **fields)

        assert ask("x" * most, logprobs=3).status_code == 200
        error_of(ask("x" * (most + 1), logprobs=3), 400, "too_large")
        error_of(ask("x" * most, logprobs=1, prompt_logprobs=4), 400, "too_large")
        error_of(ask(["x" * most] * 2, logprobs=3), 400, "too_large")
        error_of(ask("x" * most, logprobs=3, n=2), 400, "too_large")
        assert len(service.engine.batches) == 1


# Where a token's text starts


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30))
def test_a_token_starts_where_its_character_does(told: str) -> None:
    text = Text(BYTES)
    tokens = text.encode(told)
    if "<|end|>" not in told:
        assert starts_of(text, tokens, told) == [at for at, char in enumerate(told) for _ in char.encode()]


def test_what_a_tokenizer_puts_before_a_text_has_no_place_in_it() -> None:
    for tokenizer in (byte_level_with_start(), spaced_with_start()):
        text = Text(tokenizer)
        tokens = text.encode("a b a", special=True)
        assert tokens[0] == tokenizer.bos_token_id
        starts = starts_of(text, tokens, "a b a")
        assert starts[:2] == [0, 0]
        assert starts[-1] in (3, 4), "the last word, or the space before it"
        assert starts == sorted(starts)
        with_start = text.decode(tokens)
        assert starts_of(text, tokens, with_start)[1] == len("<s>")


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_has_its_own_start_gets_no_second_one(stream: bool) -> None:
    """A client that fills in a chat template itself writes the start of the text, too."""
    tokenizer = byte_level_with_start()
    seen: list[Request] = []
    with live(scripted(remembering(seen, "there")), tokenizer=tokenizer) as service:
        for fields in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
            response = complete(service, ["<s>Hi", [9]], stream=stream, **fields)
            assert response.status_code == 200
            assert "x-ignored-fields" not in response.headers
        error_of(complete(service, add_special_tokens=1), 400, None)
    start = tokenizer.bos_token_id
    twice, once, ids = [(start,) * 2 + tuple(tokens_of("Hi")), (start, *tokens_of("Hi")), (9,)]
    assert [request.prompt for request in seen] == [twice, ids, twice, ids, once, ids]


def byte_level_with_start() -> PreTrainedTokenizerFast:
    return with_start(Tokenizer.from_str(BYTES.backend_tokenizer.to_str()))


def spaced_with_start() -> PreTrainedTokenizerFast:
    """A vocabulary of words, each with the space before it, whose first one is dropped."""
    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return with_start(tokenizer)


def with_start(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(["<s>"])
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, bos_token="<s>")
