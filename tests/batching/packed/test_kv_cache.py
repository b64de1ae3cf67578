"""KV allocations and the prefix cache, against a model that keeps one flag per KV slot."""

from hypothesis import given
from hypothesis import strategies as st

from batching.packed.kv_cache import BLOCK_SIZE, KVAllocation, KVAllocator, PrefixCache

CAPACITY = 60

Action = tuple[str, int]
actions = st.lists(st.tuples(st.sampled_from(["allocate", "free", "trim"]), st.integers(0, 30)), max_size=60)


def longest_run(free: list[bool]) -> int:
    longest = run = 0
    for flag in free:
        run = run + 1 if flag else 0
        longest = max(longest, run)
    return longest


@given(actions)
def test_a_kv_slot_is_in_one_allocation_or_free_and_first_fit_never_misses_room(steps: list[Action]) -> None:
    allocator, free, taken = KVAllocator(CAPACITY), [True] * CAPACITY, list[tuple[int, int]]()
    for action, number in steps:
        if action == "allocate" and number:
            start = allocator.allocate(number)
            assert (start is None) == (longest_run(free) < number)
            if start is not None:
                assert all(free[start : start + number])
                assert not any(all(free[at : at + number]) for at in range(start)), "an earlier hole has room"
                free[start : start + number] = [False] * number
                taken.append((start, number))
        elif taken and action != "allocate":
            start, length = taken.pop(number % len(taken))
            kept = number % (length + 1) if action == "trim" else 0
            allocator.free(start + kept, length - kept)
            free[start + kept : start + length] = [True] * (length - kept)
            if kept:
                taken.append((start, kept))
        assert allocator.num_free == sum(free)
    for start, length in taken:
        allocator.free(start, length)
    assert allocator.allocate(CAPACITY) == 0


def tokens(words: list[int]) -> tuple[int, ...]:
    """A text of whole blocks, one for each word."""
    return tuple(word for word in words for _ in range(BLOCK_SIZE))


texts = st.lists(st.integers(0, 2), min_size=0, max_size=4).map(tokens)
requests = st.tuples(texts, st.sampled_from(["", "a"]), st.integers(1, 90), st.booleans())


@given(st.lists(requests, max_size=40))
def test_a_matched_prefix_is_what_was_inserted(asked: list[tuple[tuple[int, ...], str, int, bool]]) -> None:
    cache = PrefixCache(4 * BLOCK_SIZE * 4)
    content: dict[int, tuple[str, int]] = {}  # by slot: the salt and token of the row that wrote it last
    alive: list[tuple[KVAllocation, tuple[int, ...]]] = []
    for text, salt, extra, stays in asked:
        prompt = (*text, 7)
        allocation = cache.allocate(len(prompt) + extra, salt)
        if allocation is None:
            assert alive, "nothing else had room, and yet there was none"
            for other, said in alive:
                cache.release(other, said)
            alive = []
            continue
        found = cache.match_prefix(salt, prompt)
        if found is not None:
            source, length = found
            assert 0 < length < len(prompt)
            at = range(source.start, source.start + length)
            assert [content[slot] for slot in at] == [(salt, token) for token in prompt[:length]]
            assert (
                source.start >= allocation.start + allocation.length or source.start + source.length <= allocation.start
            )
        content |= {allocation.start + place: (salt, token) for place, token in enumerate(prompt)}
        cache.insert(allocation, prompt)
        if stays:
            alive.append((allocation, prompt))
        else:
            cache.release(allocation, prompt)
        assert cache.num_used == sum(held.length for held, _ in alive)
    for allocation, said in alive:
        cache.release(allocation, said)
    assert cache.num_used == 0
    assert cache.allocate(cache.capacity, "") is not None
    assert cache.num_evictable == 0


def test_the_longest_cached_prefix_is_matched_and_only_with_the_same_salt() -> None:
    cache = PrefixCache(4096)
    first = tokens([1, 2])
    allocation = cache.allocate(len(first) + 10, "a")
    assert allocation is not None
    cache.release(allocation, first)
    assert cache.match_prefix("a", tokens([1, 2, 3])) == (allocation, 2 * BLOCK_SIZE)
    assert cache.match_prefix("a", first) == (allocation, BLOCK_SIZE), "one token at least has to be processed"
    assert cache.match_prefix("a", tokens([2, 1])) is None
    assert cache.match_prefix("b", first) is None


def test_what_finished_rows_left_is_evicted_least_recently_used_first() -> None:
    cache = PrefixCache(4 * BLOCK_SIZE)
    for word in (1, 2):
        allocation = cache.allocate(2 * BLOCK_SIZE, "")
        assert allocation is not None
        cache.release(allocation, tokens([word, word]))
    assert cache.match_prefix("", tokens([1, 1, 1])) is not None  # used again, so the other is the oldest now
    assert cache.allocate(BLOCK_SIZE, "") is not None
    assert cache.match_prefix("", tokens([2, 2, 2])) is None
    assert cache.match_prefix("", tokens([1, 1, 1])) is not None


def test_nothing_stays_where_prefix_caching_is_off() -> None:
    cache = PrefixCache(4 * BLOCK_SIZE, enabled=False)
    allocation = cache.allocate(2 * BLOCK_SIZE, "")
    assert allocation is not None
    cache.insert(allocation, tokens([1, 1]))
    assert cache.match_prefix("", tokens([1, 1, 1])) is None
    cache.release(allocation, tokens([1, 1]))
    assert cache.num_used == cache.num_evictable == 0
