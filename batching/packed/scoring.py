"""Log probabilities of a prompt's tokens in the packed engine: prefill chunks of which all logits are read.

Worker thread only.
"""

from batching.engine import Steps
from batching.packed.runner import Runner, RunningSequence
from batching.scoring import PIECE, prompt_logprobs


def score(runner: Runner, sequence: RunningSequence, steps: Steps, max_tokens: int) -> bool:
    """Compute the next chunk of a prompt, at most `max_tokens`, and hand over the log probabilities of what follows.

    The prompt's last token is left to a prefill, for the next one to be sampled. Returns whether the row is over.
    """
    row, start = sequence.row, sequence.num_computed_tokens
    if start == 0 and steps.emit_prompt(row, 0, [None]):
        return True
    chunk = sequence.prefill_chunk(min(max_tokens, PIECE, sequence.remaining_prefill - 1))
    if chunk.num_tokens == 0:
        return False
    logits = runner.prompt_logits(sequence, chunk)
    sequence.num_computed_tokens += chunk.num_tokens
    tokens = row.request.prompt[start + 1 : chunk.seq_len + 1]
    return steps.emit_prompt(row, start + 1, prompt_logprobs(logits, tokens, row.request.sampling.prompt_logprobs or 0))
