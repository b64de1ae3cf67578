"""Any answer of a model: what it may have thought, said and called, and how it writes that."""

import json
from typing import Any

from hypothesis import strategies as st

WORDS = st.text("ab .é", min_size=1, max_size=8).filter(lambda text: text == text.strip())
CALLS = st.tuples(st.sampled_from("fg"), st.dictionaries(st.sampled_from("xy"), WORDS | st.integers(-9, 9), max_size=2))
ANSWERS = st.tuples(st.none() | WORDS, st.none() | WORDS, st.lists(CALLS, max_size=2))
"""What a model may have thought, said and called."""


def written(answer: Any) -> str:
    """An answer as the model writes it."""
    thought, said, calls = answer
    parts = [f"<think>\n{thought}\n</think>\n\n"] if thought else []
    parts += [said] if said else []
    for name, arguments in calls:
        parts.append(f'\n<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>')
    return "".join(parts)
