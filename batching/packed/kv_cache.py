"""The block allocator and prefix cache: which rows hold which blocks, and which prefixes later prompts can share.

Worker thread only. Only bookkeeping: no tensor is touched here. The cache tensor is divided into blocks of `BLOCK_SIZE`
KV slots, and a row's block table lists the blocks of its tokens in order (Kwon et al. 2023, PagedAttention). Complete,
computed blocks are in a prefix tree, keyed by the previous block and their tokens, so that prompts with a common prefix
share them. A block without references keeps its content until it is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

BLOCK_SIZE = 64
"""Tokens per block: as many as attention reads at a time, and few enough that a row's last block wastes little."""

Node = int | str
"""A node of the prefix tree: the salt at the root, then a unique number for each inserted block."""


def blocks_for(tokens: int) -> int:
    """Number of blocks for this many tokens."""
    return -(-tokens // BLOCK_SIZE)


@dataclass(eq=False, slots=True)
class BlockTable:
    """A row's blocks. The first `num_inserted` are in the tree, the last of them at `node`."""

    node: Node
    blocks: list[int] = field(default_factory=list)
    num_inserted: int = 0


@dataclass(frozen=True, slots=True)
class Started:
    """A new row's block table, the number of its cached tokens, and how many of those other running rows share."""

    table: BlockTable
    num_cached_tokens: int
    num_shared_tokens: int


class BlockPool:
    """`num_blocks` blocks, each free, referenced by rows' block tables, or cached for later prompts.

    Without `caching` nothing is kept or shared.
    """

    def __init__(self, num_blocks: int, *, caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self._caching = caching
        self._free = list(range(num_blocks))
        self._num_references = [0] * num_blocks
        self._evictable: dict[int, None] = {}  # cached for later prompts, least recently used first
        self._blocks: dict[tuple[Node, tuple[int, ...]], int] = {}
        self._places: dict[int, tuple[tuple[Node, tuple[int, ...]], int]] = {}  # block -> its key and node
        self._num_nodes = 0

    @property
    def num_free(self) -> int:
        """Available blocks, including those cached for later prompts."""
        return len(self._free) + len(self._evictable)

    def start(self, salt: str, tokens: Sequence[int], reserve: int = 0, *, sharing: bool = True) -> Started | None:
        """Blocks for `tokens`, reusing the longest cached prefix, but never all tokens, because one must be computed.

        Without `sharing` all of them are computed. None if fewer than `reserve` blocks would be left.
        """
        shared, node = self._match(salt, tokens if sharing else ())
        num_new = blocks_for(len(tokens)) - len(shared)
        if num_new + reserve > self.num_free - sum(block in self._evictable for block in shared):
            return None
        num_held = sum(block not in self._evictable for block in shared)
        for block in shared:
            self._evictable.pop(block, None)
            self._num_references[block] += 1
        table = BlockTable(node, [*shared, *(self._take() for _ in range(num_new))], len(shared))
        return Started(table, len(shared) * BLOCK_SIZE, num_held * BLOCK_SIZE)

    def touch(self, salt: str, tokens: Sequence[int]) -> None:
        """Mark the cached prefix of `tokens` as most recently used, because a waiting row will need it."""
        for block in reversed(self._match(salt, tokens)[0]):
            if block in self._evictable:
                self._evictable[block] = self._evictable.pop(block)

    def grow(self, table: BlockTable, tokens: int) -> bool:
        """Make room for `tokens` in total, which takes at most one more block; False if none is left."""
        if len(table.blocks) < blocks_for(tokens):
            if not self.num_free:
                return False
            table.blocks.append(self._take())
        return True

    def insert(self, table: BlockTable, tokens: Sequence[int]) -> None:
        """Add complete blocks of `tokens`, the row's first ones, whose KV is computed, to the prefix cache."""
        if not self._caching:
            return
        for number in range(table.num_inserted, len(tokens) // BLOCK_SIZE):
            content = tuple(tokens[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE])
            key, block = (table.node, content), table.blocks[number]
            known = self._blocks.get(key)
            if known is None:  # else another row was first, and this row's block stays private
                self._num_nodes += 1
                self._blocks[key] = block
                self._places[block] = key, self._num_nodes
                known = block
            table.node = self._places[known][1]
            table.num_inserted = number + 1

    def release(self, table: BlockTable, tokens: Sequence[int]) -> None:
        """Release a row's blocks. `tokens` are those computed, which stay cached for later prompts."""
        self.insert(table, tokens)
        for block in reversed(table.blocks):  # the end of a text is evicted before its start
            self._num_references[block] -= 1
            if not self._num_references[block]:
                if block in self._places:
                    self._evictable[block] = None
                else:
                    self._free.append(block)
        table.blocks = []

    def _match(self, salt: str, tokens: Sequence[int]) -> tuple[list[int], Node]:
        """The blocks of the longest cached proper prefix of `tokens`, and the node where it ends."""
        found: list[int] = []
        node: Node = salt
        for begin in range(0, len(tokens) - BLOCK_SIZE, BLOCK_SIZE):
            block = self._blocks.get((node, tuple(tokens[begin : begin + BLOCK_SIZE])))
            if block is None:
                break
            found.append(block)
            node = self._places[block][1]
        return found, node

    def _take(self) -> int:
        """Allocate a block, evicting a cached one if necessary."""
        if not self._free:
            block = next(iter(self._evictable))
            del self._evictable[block]
            del self._blocks[self._places.pop(block)[0]]
            self._free.append(block)
        block = self._free.pop()
        self._num_references[block] = 1
        return block
