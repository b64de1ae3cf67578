"""Where a session's requests go: rendezvous hashing with bounded load."""

from collections.abc import Iterable, Mapping
from hashlib import blake2b

LEEWAY = 1.25
"""How many times the average of all replicas' requests one may have before its sessions go elsewhere,"""
FEW = 4
"""but for this many requests."""


def home(session: str, replicas: Iterable[str]) -> str:
    """The replica of a session, by rendezvous hashing: without another replica it is the same one still.

    Raises ValueError for no replicas.
    """
    return max(replicas, key=lambda replica: blake2b(f"{replica}/{session}".encode(), digest_size=8).digest())


def has_room(replica: str, requests: Mapping[str, int]) -> bool:
    """Whether one more leaves this replica within the leeway. `requests` are by replica, as far as known."""
    average = (sum(requests.values()) + 1) / max(len(requests), 1)
    return requests.get(replica, 0) + 1 <= max(LEEWAY * average, FEW)
