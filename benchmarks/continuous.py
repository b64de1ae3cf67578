"""transformers' own continuous batching, for the engine benchmark to compare with."""

import time
from collections.abc import Sequence

from transformers import GenerationConfig, PreTrainedModel

from batching.stream import Row


def run_continuous(model: PreTrainedModel, rows: Sequence[Row]) -> float:
    """Seconds until all rows have their tokens. Raises RuntimeError if one has not."""
    config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=-1)
    manager = model.init_continuous_batching(generation_config=config)  # type: ignore[operator]
    manager.start()
    started = time.perf_counter()
    for row in rows:
        request = row.request
        manager.add_request(list(request.prompt), request.id, max_new_tokens=request.sampling.max_tokens)
    lengths: dict[str, int] = {}
    while len(lengths) < len(rows):
        found = manager.get_result(timeout=300)
        if found is None:
            raise RuntimeError("continuous batching stopped before all rows had their tokens")
        if found.is_finished():
            lengths[found.request_id] = len(found.generated_tokens)
    seconds = time.perf_counter() - started
    manager.stop(block=True)
    if lengths != {row.request.id: row.request.sampling.max_tokens for row in rows}:
        raise RuntimeError("continuous batching returned other numbers of tokens than requested")
    return seconds
