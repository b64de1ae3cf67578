"""Laws of where a session's requests go among the replicas of Ray Serve."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from deploy.ray.sessions import FEW, LEEWAY, has_room, home


@given(sessions=st.lists(st.text(), min_size=1), replicas=st.sets(st.text(min_size=1), min_size=2), data=st.data())
def test_without_a_replica_only_its_own_sessions_move(
    sessions: list[str], replicas: set[str], data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from(sorted(replicas)))
    for session in sessions:
        before, after = home(session, replicas), home(session, replicas - {gone})
        assert after == before or before == gone


def test_sessions_are_spread_over_all_replicas() -> None:
    replicas = [f"replica-{number}" for number in range(8)]
    homes = Counter(home(f"session-{number}", replicas) for number in range(8000))
    assert all(800 < homes[replica] < 1200 for replica in replicas)


@given(requests=st.dictionaries(st.text(), st.integers(0, 1000), min_size=1))
def test_some_replica_always_has_room_and_none_that_is_far_above_the_average(requests: dict[str, int]) -> None:
    average = (sum(requests.values()) + 1) / len(requests)
    assert has_room(min(requests, key=lambda replica: requests[replica]), requests)
    for replica, count in requests.items():
        assert not (count >= FEW and count >= LEEWAY * average and has_room(replica, requests))
