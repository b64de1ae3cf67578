"""What holds for every test: the developer's own settings of the service are out of sight, event loops are watched."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from server.settings import PREFIX
from tests import loop_guard

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, by whichever test that is

# No test asserts how fast it is. Fewer examples than Hypothesis would take by itself, 100, because there are many laws.
settings.register_profile("patient", deadline=None, max_examples=60)
settings.load_profile("patient")

TEST_TOKENIZER = os.environ.get("QWEN3_TOKENIZER")
"""A folder with a tokenizer whose chat template can think; read here because no test sees the variable."""


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith(PREFIX):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def quick_loops() -> Iterator[None]:
    """Servers that several tests share are asked after each of them; others when they end."""
    yield
    loop_guard.check_all()


@pytest.fixture
def thinking_tokenizer() -> str:
    if TEST_TOKENIZER is None:
        pytest.skip("QWEN3_TOKENIZER names no folder")
    return TEST_TOKENIZER
