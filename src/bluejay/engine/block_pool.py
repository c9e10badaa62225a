"""The blocks of the paged cache: who holds which, and which tokens a block that nobody holds still remembers.

free        never written, or forgotten      ─┐ allocate() takes from here, the least recently used last
cached      published, held by nobody        ─┘
held        by one sequence or by several

A full block may be published under the hash of its tokens and of all before them; a later prompt that begins with the
same tokens then shares it instead of computing it again.

Source: Kwon et al. 2023 (arXiv:2309.06180), section 4; the chained hash is vLLM's "automatic prefix caching".
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence


class BlockPool:
    """Hands out blocks by number; the memory that they stand for is somebody else's.

    Args:
        num_blocks: blocks in all.
        block_size: tokens in each.

    Attributes:
        stamps: for each block how often it was handed out anew: who remembers a block's content remembers its stamp.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.stamps = [0] * num_blocks
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._published: dict[bytes, int] = {}
        self._free = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, those included that would forget something."""
        return len(self._free) + len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_published(self) -> int:
        """Blocks whose tokens a prompt may find."""
        return len(self._published)

    def allocate(self) -> int:
        """Hand out a block, held once; there must be one, see `num_free`."""
        if self._free:
            block = self._free.popleft()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        self._references[block] = 1
        self.stamps[block] += 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """Hold blocks once more: held ones, or cached ones that `find` has told."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of a sequence's blocks, in its table's order; ends of tables are forgotten before beginnings."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._hashes[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def may_write(self, block: int) -> bool:
        """Whether its only holder may change a block's content; else it must be copied."""
        return self._references[block] == 1 and self._hashes[block] is None

    def publish(self, block: int, block_hash: bytes) -> None:
        """Let others find a full block that is held; the first of equal ones is kept."""
        if self._hashes[block] is None and block_hash not in self._published:
            self._hashes[block] = block_hash
            self._published[block_hash] = block

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest published beginning."""
        found = []
        for block_hash in hashes:
            block = self._published.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def num_cached(self, blocks: Iterable[int]) -> int:
        """How many of these blocks nobody holds: sharing them takes them from `num_free`."""
        return sum(self._references[block] == 0 for block in blocks)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Check that the pool agrees with the block tables of all sequences. Raises: AssertionError."""
        held = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), f"a table holds a block twice: {table}"
            for block in table:
                held[block] += 1
        wrong = [(block, held[block], count) for block, count in enumerate(self._references) if held[block] != count]
        assert not wrong, f"blocks whose holders are (block, tables, counted): {wrong[:10]}"
        unheld = [block for block in range(self.num_blocks) if held[block] == 0]
        assert sorted([*self._free, *self._cached]) == unheld, "a block that nobody holds is lost, or twice there"
        published = {block_hash: block for block, block_hash in enumerate(self._hashes) if block_hash is not None}
        assert published == self._published, "what blocks remember and what can be found differ"
        assert all(self._hashes[block] is None for block in self._free), "a free block remembers something"
        assert all(self._hashes[block] is not None for block in self._cached), "a cached block remembers nothing"

    def _forget(self, block: int) -> None:
        block_hash = self._hashes[block]
        assert block_hash is not None
        del self._published[block_hash]
        self._hashes[block] = None


def chain_hashes(token_ids: Sequence[int], block_size: int, parent: bytes) -> Iterator[bytes]:
    """For each full block of tokens the SHA-256 of its tokens and of its parent's hash.

    Args:
        parent: the hash of what stands before the tokens, or a salt at the beginning: who has another finds nothing.
    """
    for first in range(0, len(token_ids) - block_size + 1, block_size):
        parent = hashlib.sha256(parent + array("q", token_ids[first : first + block_size]).tobytes()).digest()
        yield parent
