"""A regular expression for any of many texts."""

import re
from collections.abc import Collection
from itertools import groupby
from os.path import commonprefix


def any_of(texts: Collection[str]) -> str:
    """A pattern for any of these texts, the longest that fits, as a prefix tree, so that each character is examined
    once. One of them may be empty. As deep as beginnings are shared, not as texts are long."""
    longer = [text for text in texts if text]
    if not longer:
        return ""
    groups = [list(group) for _, group in groupby(sorted(longer), key=lambda text: text[0])]
    found = []
    for group in groups:
        shared = commonprefix(group)  # noqa: RUF071  # of texts, not of paths
        found.append(re.escape(shared) + any_of([text[len(shared) :] for text in group]))
    pattern = found[0] if len(found) == 1 else f"(?:{'|'.join(found)})"
    return pattern if len(longer) == len(texts) else f"(?:{pattern})?"
