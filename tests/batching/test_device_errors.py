"""Which errors end the worker, and which only their batch."""

from collections.abc import Callable

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from batching.batcher import Batcher
from batching.errors import EngineError, is_sticky
from batching.events import Outcome, State
from batching.memory import is_shortage
from batching.progress import Progress
from tests.batching.conftest import Runner, request
from tests.batching.test_batcher import serving, start
from tests.fakes import ScriptedEngine
from tests.tiny import tiny_model

STICKY = [
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ..."),
    torch.AcceleratorError("unspecified launch failure"),
]
SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB, other allocations: 1.00 GB)."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
]
PASSING = [RuntimeError("shapes do not match"), ValueError("scripted"), *SHORTAGES]


@pytest.mark.parametrize("error", STICKY, ids=str)
def test_an_error_that_the_device_keeps_is_sticky(error: Exception) -> None:
    assert is_sticky(error)


@pytest.mark.parametrize("error", PASSING, ids=str)
def test_an_error_that_passes_is_not(error: Exception) -> None:
    assert not is_sticky(error)


@pytest.mark.parametrize("error", SHORTAGES, ids=str)
def test_an_error_that_asks_for_a_smaller_batch_is_a_shortage(error: RuntimeError) -> None:
    assert is_shortage(error)


@pytest.mark.parametrize("error", [*STICKY, *PASSING[:2]], ids=str)
def test_another_error_is_not(error: RuntimeError) -> None:
    assert not is_shortage(error)


def test_after_a_sticky_error_nothing_more_is_tried(run_async: Runner) -> None:
    def fail(step: int) -> None:
        raise STICKY[0]

    async def main() -> None:
        engine = ScriptedEngine(stepped=True, before_step=fail)
        async with serving(engine) as (batcher, log):
            running = await start(batcher, log)
            waiting = batcher.submit(request(id="waiting"))
            engine.release()
            await failed(batcher)
            for stream in (running, waiting):
                with pytest.raises(EngineError):
                    await anext(stream)
            assert engine.batches == [["running"]]
            assert log.outcomes() == {"running": Outcome.ERROR, "waiting": Outcome.ERROR}

    async def failed(batcher: Batcher) -> None:
        await batcher.ended.wait()
        assert batcher.state is State.FAILED
        assert batcher.error is STICKY[0]

    run_async(main)


def gpt2() -> PreTrainedModel:
    """Whose list of layers has another name than most."""
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=100, bos_token_id=None, eos_token_id=None)
    model: PreTrainedModel = GPT2LMHeadModel(config).eval()
    return model


@pytest.mark.parametrize("make", [tiny_model, gpt2])
def test_each_layer_of_a_forward_pass_on_a_cpu_is_progress(make: Callable[[], PreTrainedModel]) -> None:
    class Counting(Progress):
        marks = 0

        def mark(self) -> None:
            self.marks += 1

    progress, model = Counting(), make()
    before = model(torch.tensor([[1, 2, 3]])).logits
    progress.follow(model)
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, before)
    assert progress.marks == model.config.num_hidden_layers
