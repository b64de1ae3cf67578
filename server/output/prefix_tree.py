"""A regular expression for any of many texts."""

import re
from collections.abc import Collection
from itertools import groupby


def any_of(texts: Collection[str]) -> str:
    """A pattern for any of these texts, the longest that fits, as a prefix tree, so that each character is examined
    once. One of them may be empty."""
    longer = [text for text in texts if text]
    groups = groupby(sorted(longer), key=lambda text: text[0])
    found = [re.escape(first) + any_of([text[1:] for text in group]) for first, group in groups]
    pattern = found[0] if len(found) == 1 else f"(?:{'|'.join(found)})"
    return pattern if len(longer) == len(texts) else f"(?:{pattern})?"
