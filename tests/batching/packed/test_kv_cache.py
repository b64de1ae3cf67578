"""Extents and the pool's shared beginnings, against a model that keeps one flag a slot."""

from hypothesis import given
from hypothesis import strategies as st

from batching.packed.kv_cache import BLOCK, Extent, Extents, Pool

CAPACITY = 60

Action = tuple[str, int]
actions = st.lists(st.tuples(st.sampled_from(["take", "give back", "trim"]), st.integers(0, 30)), max_size=60)


def longest_run(free: list[bool]) -> int:
    longest = run = 0
    for flag in free:
        run = run + 1 if flag else 0
        longest = max(longest, run)
    return longest


@given(actions)
def test_a_slot_is_in_one_extent_or_free_and_first_fit_never_misses_room(steps: list[Action]) -> None:
    extents, free, taken = Extents(CAPACITY), [True] * CAPACITY, list[tuple[int, int]]()
    for action, number in steps:
        if action == "take" and number:
            start = extents.take(number)
            assert (start is None) == (longest_run(free) < number)
            if start is not None:
                assert all(free[start : start + number])
                assert not any(all(free[at : at + number]) for at in range(start)), "an earlier hole has room"
                free[start : start + number] = [False] * number
                taken.append((start, number))
        elif taken and action != "take":
            start, length = taken.pop(number % len(taken))
            kept = number % (length + 1) if action == "trim" else 0
            extents.give_back(start + kept, length - kept)
            free[start + kept : start + length] = [True] * (length - kept)
            if kept:
                taken.append((start, kept))
        assert extents.free == sum(free)
    for start, length in taken:
        extents.give_back(start, length)
    assert extents.take(CAPACITY) == 0


def tokens(words: list[int]) -> tuple[int, ...]:
    """A text of whole blocks, one for each word."""
    return tuple(word for word in words for _ in range(BLOCK))


texts = st.lists(st.integers(0, 2), min_size=0, max_size=4).map(tokens)
requests = st.tuples(texts, st.sampled_from(["", "a"]), st.integers(1, 90), st.booleans())


@given(st.lists(requests, max_size=40))
def test_what_is_found_in_the_pool_is_what_was_put_there(asked: list[tuple[tuple[int, ...], str, int, bool]]) -> None:
    pool = Pool(4 * BLOCK * 4)
    content: dict[int, tuple[str, int]] = {}  # by slot: the salt and token of the row that wrote it last
    alive: list[tuple[Extent, tuple[int, ...]]] = []
    for text, salt, extra, stays in asked:
        prompt = (*text, 7)
        extent = pool.reserve(len(prompt) + extra, salt)
        if extent is None:
            assert alive, "nothing else had room, and yet there was none"
            for other, said in alive:
                pool.release(other, said)
            alive = []
            continue
        found = pool.beginning(salt, prompt)
        if found is not None:
            source, length = found
            assert 0 < length < len(prompt)
            at = range(source.start, source.start + length)
            assert [content[slot] for slot in at] == [(salt, token) for token in prompt[:length]]
            assert source.start >= extent.start + extent.length or source.start + source.length <= extent.start
        content |= {extent.start + place: (salt, token) for place, token in enumerate(prompt)}
        pool.share(extent, prompt)
        if stays:
            alive.append((extent, prompt))
        else:
            pool.release(extent, prompt)
        assert pool.used == sum(held.length for held, _ in alive)
    for extent, said in alive:
        pool.release(extent, said)
    assert pool.used == 0
    assert pool.reserve(pool.capacity, "") is not None
    assert pool.kept == 0


def test_the_longest_known_beginning_is_found_and_only_with_the_same_salt() -> None:
    pool = Pool(4096)
    first = tokens([1, 2])
    extent = pool.reserve(len(first) + 10, "a")
    assert extent is not None
    pool.release(extent, first)
    assert pool.beginning("a", tokens([1, 2, 3])) == (extent, 2 * BLOCK)
    assert pool.beginning("a", first) == (extent, BLOCK), "one token at least has to be processed"
    assert pool.beginning("a", tokens([2, 1])) is None
    assert pool.beginning("b", first) is None


def test_what_finished_rows_left_gives_way_oldest_first() -> None:
    pool = Pool(4 * BLOCK)
    for word in (1, 2):
        extent = pool.reserve(2 * BLOCK, "")
        assert extent is not None
        pool.release(extent, tokens([word, word]))
    assert pool.beginning("", tokens([1, 1, 1])) is not None  # used again, so the other is the oldest now
    assert pool.reserve(BLOCK, "") is not None
    assert pool.beginning("", tokens([2, 2, 2])) is None
    assert pool.beginning("", tokens([1, 1, 1])) is not None


def test_nothing_stays_where_sharing_is_off() -> None:
    pool = Pool(4 * BLOCK, sharing=False)
    extent = pool.reserve(2 * BLOCK, "")
    assert extent is not None
    pool.share(extent, tokens([1, 1]))
    assert pool.beginning("", tokens([1, 1, 1])) is None
    pool.release(extent, tokens([1, 1]))
    assert pool.used == pool.kept == 0
