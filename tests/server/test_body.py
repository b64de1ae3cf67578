"""Laws of how a request's body is read, over a real connection: codings, byte order marks, bounds."""

import gzip
import random
import zlib
from collections.abc import Callable, Iterator

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.live import QUESTION, Live, live

LIMIT = 100_000
CODINGS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
}


@pytest.fixture(scope="module")
def service() -> Iterator[Live]:
    with live(max_body_mib=LIMIT / 2**20) as found:
        yield found


def body_of(size: int, seed: int = 0) -> bytes:
    """A chat of so many bytes, of which compression leaves about half."""
    frame = len(orjson.dumps({"messages": QUESTION, "user": ""}))
    return orjson.dumps(
        {"messages": QUESTION, "user": random.Random(seed).randbytes(size)[: (size - frame) // 2].hex()}
    )


@pytest.mark.parametrize("coding", CODINGS)
@given(size=st.integers(200, LIMIT), cut=st.integers(1, LIMIT))
def test_a_compressed_body_is_what_it_was(service: Live, coding: str, size: int, cut: int) -> None:
    packed = CODINGS[coding](body_of(size))
    chunks = iter([packed[:cut], packed[cut:]])
    assert service.post(chunks, headers={"content-encoding": coding}).status_code == 200


@pytest.mark.parametrize("coding", CODINGS)
def test_the_limit_counts_what_comes_out(service: Live, coding: str) -> None:
    bomb = CODINGS[coding](b" " * 2**26)
    assert len(bomb) < LIMIT
    answer = service.post(bomb, headers={"content-encoding": coding})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "compress"])
def test_another_coding_is_refused_in_words(service: Live, coding: str) -> None:
    answer = service.post(body_of(200), headers={"content-encoding": coding})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_encoding")
    assert answer.headers["accept-encoding"] == "gzip, deflate"


BROKEN = {
    "not compressed": body_of(200),
    "cut": gzip.compress(body_of(200))[:-1],
    "more behind it": gzip.compress(body_of(200)) + b"x",
    "changed": gzip.compress(body_of(200))[:30] + b"xx" + gzip.compress(body_of(200))[32:],
    "empty": b"",
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_body_that_does_not_decompress_is_refused(service: Live, what: str) -> None:
    answer = service.post(BROKEN[what], headers={"content-encoding": "gzip"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "corrupt_body")


def test_a_byte_order_mark_is_skipped(service: Live) -> None:
    marked = b"\xef\xbb\xbf" + body_of(200)
    assert service.post(marked).status_code == 200
    assert service.post(gzip.compress(marked), headers={"content-encoding": "gzip"}).status_code == 200
