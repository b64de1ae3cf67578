"""Whether a request can be answered in time, found out before it waits for nothing. Loop only."""

from collections.abc import Sequence

from batching.rate import ServiceRate
from batching.types import Request

FEWEST = 16
"""Answers that a pace is taken from at least. The first ones may have waited for a device that warmed up."""

MARGIN = 0.8
"""Share of a time limit that the expected wait may take: answers end in batches, not at an even pace."""


def seconds_late(requests: Sequence[Request], ahead: int, running: int, rate: ServiceRate) -> float:
    """By how much these would likely miss their time limit; 0 if they would not.

    A request that finds n others before it is answered after about n + 1 times the pace of answers (Little's law).
    `ahead` rows wait and are served before these, `running` ones are being served. Where none waits ahead a request is
    always in time, so that a pace of long ago keeps nobody out, and so it is while there are too few answers to tell.
    """
    if not ahead or rate.answers < FEWEST:
        return 0.0
    limit = MARGIN * min(request.time_limit for request in requests)
    return max(0.0, rate.expected(ahead + running + len(requests)) - limit)
