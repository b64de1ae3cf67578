"""Triton kernels are compiled for the cards that they are meant for, which need not be there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

pytest.importorskip("triton")

from batching.packed.cuda_graphs import FewLayers
from tests.tiny import tiny_model

CARDS = {"A100": (80, 163 * 1024, 10), "L40S": (89, 99 * 1024, 6), "H100": (90, 227 * 1024, 17)}
"""Compute capability, the most shared memory of a program (NVIDIA's tuning guides for Ampere, Ada and Hopper), and the
number of kernels: those for FP8 are for cards that have such units, and of Ada's only those that may not fit."""


@pytest.mark.parametrize("card", CARDS)
def test_kernels_compile_and_fit(card: str, tmp_path: Path) -> None:
    capability, most, kernels = CARDS[card]
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "tests.batching.packed.compiled", str(capability)]
    told = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert told.returncode == 0, told.stderr
    sizes = json.loads(told.stdout)
    assert len({name for name, _ in sizes}) == kernels
    assert [pair for pair in sizes if pair[1] > most] == []


def test_each_form_of_layer_is_run_before_a_pass_is_captured() -> None:
    """Where the first and the last layer alone are kept out of FP8, the others have kernels of their own."""
    model = tiny_model(num_hidden_layers=6)
    layers = model.model.layers
    for layer in layers[1:-1]:
        layer.mlp.down_proj = nn.Linear(128, 64)
    with FewLayers(model).alone():
        first, other, last = model.model.layers
        assert first is layers[0]
        assert other in layers[1:-1]
        assert last is layers[-1]
    assert model.model.layers is layers
