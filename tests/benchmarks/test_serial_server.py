"""Laws of the baseline server, on a two-layer random model with a vocabulary of bytes."""

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx2
import orjson
import pytest
import torch
from starlette.applications import Starlette
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from batching.checkpoint import locate
from batching.model import load
from benchmarks.serial_server import SerialServer

TEMPLATE = "{% for message in messages %}<s>{{ message.content }}{% endfor %}<s>"
QUESTION = [{"role": "user", "content": "What is a harbor?"}]
PROMPT_TOKENS = len("<What is a harbor?<")  # each <s> is one token, and so is each byte


def save_tokenizer(folder: Path) -> None:
    """A byte-level vocabulary of 256 tokens without merges, and one special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: number for number, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, chat_template=TEMPLATE).save_pretrained(folder)


def save_model(folder: Path) -> None:
    config = Qwen3Config(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        eos_token_id=None,
    )
    torch.manual_seed(7)
    Qwen3ForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> SerialServer:
    folder = tmp_path_factory.mktemp("tiny")
    save_tokenizer(folder)
    save_model(folder)
    checkpoint = locate(str(folder), "auto", folder / "cache")
    model = load(checkpoint, device="cpu", dtype="float32", load_format="auto")
    return SerialServer(model, AutoTokenizer.from_pretrained(checkpoint), "tiny")


async def post(app: Starlette, **body: Any) -> httpx2.Response:
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
        return await client.post("/v1/chat/completions", json=body)


def chat(server: SerialServer, **fields: Any) -> httpx2.Response:
    body = {"messages": QUESTION, "temperature": 0, "max_tokens": 24} | fields
    return asyncio.run(post(server.app(), **body))


def chunks(response: httpx2.Response) -> list[dict[str, Any]]:
    *events, done, end = response.content.split(b"\n\n")
    assert (done, end) == (b"data: [DONE]", b"")
    return [orjson.loads(event.removeprefix(b"data: ")) for event in events]


def streamed_text(found: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content", "") for chunk in found for choice in chunk["choices"])


def test_a_streamed_answer_is_the_plain_answer(server: SerialServer) -> None:
    plain = chat(server).json()
    found = chunks(chat(server, stream=True))
    assert streamed_text(found) == plain["choices"][0]["message"]["content"] != ""
    assert found[-1]["choices"][0]["finish_reason"] == plain["choices"][0]["finish_reason"] == "length"


def test_usage_counts_are_true(server: SerialServer) -> None:
    expected = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": 24, "total_tokens": PROMPT_TOKENS + 24}
    assert chat(server).json()["usage"] == expected
    found = chunks(chat(server, stream=True, stream_options={"include_usage": True}))
    assert found[-1]["choices"] == []
    assert found[-1]["usage"] == expected


def test_usage_is_streamed_only_on_request(server: SerialServer) -> None:
    assert all("usage" not in chunk for chunk in chunks(chat(server, stream=True)))


def test_an_answer_stops_at_the_end_of_text_unless_told_otherwise(
    server: SerialServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = chunks(chat(server, stream=True))
    monkeypatch.setattr(server._model.generation_config, "eos_token_id", first_token(server))
    stopped = chat(server).json()
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert stopped["usage"]["completion_tokens"] == 1
    assert streamed_text(chunks(chat(server, stream=True, ignore_eos=True))) == streamed_text(full)


def first_token(server: SerialServer) -> int:
    prompt = server._tokenizer.apply_chat_template(QUESTION, return_tensors="pt", return_dict=True)
    return int(server._model(**prompt).logits[0, -1].argmax())


def test_requests_sent_together_get_the_answers_they_get_alone(server: SerialServer) -> None:
    async def together() -> list[httpx2.Response]:
        app, bodies = server.app(), [{"messages": [{"role": "user", "content": text}]} for text in "abc"]
        return await asyncio.gather(*(post(app, **body, temperature=0, max_tokens=8) for body in bodies))

    alone = [chat(server, messages=[{"role": "user", "content": text}], max_tokens=8) for text in "abc"]
    assert contents(asyncio.run(together())) == contents(alone)


def contents(responses: list[httpx2.Response]) -> list[str]:
    return [response.json()["choices"][0]["message"]["content"] for response in responses]


def test_sampling_gives_as_many_tokens_as_asked(server: SerialServer) -> None:
    assert chat(server, temperature=0.8, max_tokens=5).json()["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize("fields", [{"messages": None}, {"messages": "text"}, {"max_tokens": "many"}])
def test_a_body_that_makes_no_chat_is_refused(server: SerialServer, fields: dict[str, Any]) -> None:
    assert chat(server, **fields).status_code == 400


def test_an_abandoned_answer_frees_the_model(server: SerialServer) -> None:
    steps: list[int] = []
    hook = server._model.register_forward_hook(lambda *_: steps.append(1))
    asyncio.run(read_one_piece(server, max_tokens=400))
    server._worker.submit(hook.remove).result()
    assert 0 < len(steps) < 400


async def read_one_piece(server: SerialServer, max_tokens: int) -> None:
    body = {"messages": QUESTION, "temperature": 0, "max_tokens": max_tokens}
    async with aclosing(server._pieces(server._read(body))) as pieces:
        await anext(pieces)


def test_the_model_is_listed_and_ready(server: SerialServer) -> None:
    async def get(path: str) -> httpx2.Response:
        transport = httpx2.ASGITransport(app=server.app())
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.get(path)

    assert asyncio.run(get("/v1/models")).json()["data"][0]["id"] == "tiny"
    assert asyncio.run(get("/health/ready")).status_code == 200
