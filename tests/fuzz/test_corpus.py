"""Inputs that fuzzing found worth keeping, those that once broke a law among them, and hundreds of random ones."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
KEPT = sorted(file for name in TARGETS for file in (CORPUS / name).iterdir())


@pytest.mark.parametrize("file", KEPT, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_what_was_kept_holds_its_law(file: Path) -> None:
    TARGETS[file.parent.name](file.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=500)
@given(data=st.binary(max_size=200))
def test_any_bytes_hold_the_law(name: str, data: bytes) -> None:
    TARGETS[name](data)
