"""The pool of KV cache blocks, against a model that keeps what was written to each block."""

from hypothesis import given
from hypothesis import strategies as st

from batching.packed.kv_cache import BLOCK_SIZE, BlockPool, BlockTable, blocks_for

Text = tuple[int, ...]


def tokens(words: list[int]) -> Text:
    """A text of whole blocks, one for each word."""
    return tuple(word for word in words for _ in range(BLOCK_SIZE))


texts = st.lists(st.integers(0, 2), min_size=0, max_size=4).map(tokens)
rows = st.tuples(texts, st.sampled_from(["", "a"]), st.integers(0, 150), st.integers(0, 3))


class Told:
    """Rows on a pool, and by block what was written to it last: salt, and all tokens up to its end."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.content: dict[int, tuple[str, Text]] = {}
        self.alive: list[tuple[BlockTable, str, Text]] = []

    def start(self, salt: str, prompt: Text, reserve: int) -> bool:
        free = self.pool.num_free
        started = self.pool.start(salt, prompt, reserve)
        if started is None:
            assert self.pool.num_free == free
            return False
        table, cached = started.table, started.num_cached_tokens
        assert 0 <= started.num_shared_tokens <= cached < len(prompt)
        assert self.pool.num_free >= reserve
        assert len(table.blocks) == blocks_for(len(prompt))
        for number in range(cached // BLOCK_SIZE):
            assert self.content[table.blocks[number]] == (salt, prompt[: (number + 1) * BLOCK_SIZE])
        self.alive.append((table, salt, prompt))
        self.write(table, salt, prompt, cached // BLOCK_SIZE)
        return True

    def write(self, table: BlockTable, salt: str, said: Text, first: int) -> None:
        others = {block for other, _, _ in self.alive if other is not table for block in other.blocks}
        for number in range(first, len(table.blocks)):
            assert table.blocks[number] not in others, "nobody writes to a block that another row reads"
            self.content[table.blocks[number]] = salt, said[: (number + 1) * BLOCK_SIZE]
        self.pool.insert(table, said)

    def grow(self, place: int, by: int) -> None:
        table, salt, said = self.alive[place]
        before, free = len(table.blocks), self.pool.num_free
        longer = said + (7,) * by
        while len(table.blocks) < blocks_for(len(longer)):
            if not self.pool.grow(table, len(longer)):
                assert self.pool.num_free == 0
                longer = longer[: len(table.blocks) * BLOCK_SIZE]
        assert self.pool.num_free == free - (len(table.blocks) - before)
        self.alive[place] = table, salt, longer
        self.write(table, salt, longer, len(said) // BLOCK_SIZE)

    def release(self, place: int) -> None:
        table, _, said = self.alive.pop(place)
        self.pool.release(table, said)


@given(st.lists(rows, max_size=40), st.booleans())
def test_a_shared_prefix_is_what_was_computed_and_no_block_is_lost(
    asked: list[tuple[Text, str, int, int]], caching: bool
) -> None:
    told = Told(BlockPool(12, caching=caching))
    for text, salt, extra, what in asked:
        prompt = (*text, 8)
        while not told.start(salt, prompt, what):
            if not told.alive:
                assert blocks_for(len(prompt)) + what > 12, "nothing else had room, and yet there was none"
                break
            told.release(0)
        if told.alive and what % 2:
            told.grow(len(told.alive) // 2, extra)
        if told.alive and what == 2:
            told.release(len(told.alive) - 1)
        held = {block for table, _, _ in told.alive for block in table.blocks}
        assert told.pool.num_free == 12 - len(held)
    while told.alive:
        told.release(0)
    assert told.pool.num_free == 12
    assert caching or not told.pool._evictable
    assert told.start("", (9,) * (12 * BLOCK_SIZE), 0), "all of it can be had"


def cached(pool: BlockPool, salt: str, prompt: Text) -> int:
    """How many of the prompt's tokens are found, by a row that comes and goes."""
    started = pool.start(salt, prompt)
    assert started is not None
    pool.release(started.table, prompt[: started.num_cached_tokens])
    return started.num_cached_tokens


def leave(pool: BlockPool, salt: str, said: Text) -> None:
    """A row comes, is computed and goes."""
    started = pool.start(salt, said)
    assert started is not None
    pool.release(started.table, said)


def test_the_longest_cached_prefix_is_shared_and_only_within_its_salt() -> None:
    pool = BlockPool(20)
    leave(pool, "a", tokens([1, 2]))
    assert cached(pool, "a", tokens([1, 2, 3])) == 2 * BLOCK_SIZE
    assert cached(pool, "a", tokens([1, 3, 2])) == BLOCK_SIZE
    assert cached(pool, "a", tokens([1, 2])) == BLOCK_SIZE, "one token at least has to be computed"
    assert cached(pool, "a", tokens([2, 1])) == 0
    assert cached(pool, "b", tokens([1, 2, 3])) == 0


def test_rows_that_run_at_the_same_time_hold_a_prefix_once() -> None:
    pool = BlockPool(10)
    prompt = (*tokens([1, 2, 3]), 5)
    first = pool.start("", prompt)
    assert first is not None
    pool.insert(first.table, prompt)
    second = pool.start("", prompt)
    assert second is not None
    assert second.num_shared_tokens == 3 * BLOCK_SIZE
    assert second.table.blocks[:3] == first.table.blocks[:3]
    assert pool.num_free == 10 - 5
    pool.release(first.table, prompt)
    assert pool.num_free == 10 - 4, "the other one still has it"


def test_what_finished_rows_left_is_evicted_least_recently_used_first_and_from_its_end() -> None:
    pool = BlockPool(4)
    leave(pool, "", tokens([1, 1]))
    leave(pool, "", tokens([2, 2]))
    assert cached(pool, "", (*tokens([1]), 5)) == BLOCK_SIZE  # used again, so the other is the oldest now
    assert pool.start("", (9,) * 2 * BLOCK_SIZE) is not None
    assert cached(pool, "", (*tokens([1]), 5)) == BLOCK_SIZE
    pool = BlockPool(4)
    leave(pool, "", tokens([1, 1, 1]))
    other = pool.start("", (9,) * 2 * BLOCK_SIZE)
    assert other is not None
    pool.release(other.table, ())
    assert cached(pool, "", (*tokens([1, 1]), 5)) == 2 * BLOCK_SIZE


def test_what_a_waiting_row_will_share_is_evicted_last() -> None:
    pool = BlockPool(4)
    leave(pool, "", tokens([1, 1]))
    leave(pool, "", tokens([2, 2]))
    pool.touch("", (*tokens([1, 1]), 5))
    other = pool.start("", (9,) * 2 * BLOCK_SIZE)
    assert other is not None
    pool.release(other.table, ())
    assert cached(pool, "", (*tokens([1, 1]), 5)) == 2 * BLOCK_SIZE
    assert cached(pool, "", (*tokens([2, 2]), 5)) == 0


def test_nothing_stays_where_prefix_caching_is_off() -> None:
    pool = BlockPool(4, caching=False)
    leave(pool, "", tokens([1, 1]))
    assert not pool._evictable
    assert cached(pool, "", tokens([1, 1, 1])) == 0
