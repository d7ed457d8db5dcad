"""The block pool and the prefix cache.

A KV block holds `block_size` tokens. Block 0 is the null block: padding writes there, nobody owns it.
Every other block is in exactly one of three places:

                     allocate                          release
        ┌──────────┐ ────────► ┌───────────────────┐ ──────────► no content known: `_plain`
        │   free   │           │ used, n references│             content known:   `_idle` (oldest first)
        └──────────┘ ◄──────── └───────────────────┘
              ▲   evict: the content is forgotten  ▲ share: a prefix hit, from use or from `_idle`

The cache is a tree of contents. A node stands for the text from the beginning of a sequence to the end
of one full block; it is reached from its parent by the tokens of that block, compared in full, so that
two texts can never be taken for one another. It has several roots: only texts that begin at the same one
share (see `BlockPool.root`). A block is registered only once its content will have been computed by an
earlier plan than any that can share it: plans run in order on the device, so a plan may share what the plans
before it computed, although nobody has seen a result yet.

What a block holds is told a table in shared memory too (`kept_blocks.py`), for the scheduler of the next
generation: once it has been computed for certain, which is when the results are here.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import sha256

from tpworker.scheduler.cache_events import CacheEvents
from tpworker.scheduler.kept_blocks import KeptBlocks, Node, Root

_NO_SALT = bytes(32)


class BlockPool:
    """Blocks 1 … num_blocks - 1 of a KV cache, with their references and known contents.

    Args:
        num_blocks: blocks of the KV cache, the null block included.
        block_size: tokens in a block.
        caching: False: nobody shares blocks but the choices of one request.
        kept: what these blocks are known to hold; told of what they will. None: nobody comes after us.
        events: told of what is found, and what is not any more; None: nobody wants to know.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        caching: bool,
        kept: KeptBlocks | None = None,
        events: CacheEvents | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.caching = caching
        self._references = [0] * num_blocks
        self._plain = list(range(num_blocks - 1, 0, -1))  # popped from the end: block 1 first
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._edge_of_block: dict[int, tuple[Node, bytes]] = {}
        self._children: dict[tuple[Node, bytes], tuple[int, int]] = {}  # (parent, tokens) -> (node, block)
        self._next_node = 1
        self._kept = kept
        self._events = events
        self._unanswered: list[tuple[int, int]] = []
        if kept is not None:
            self._restore(kept)

    def _restore(self, kept: KeptBlocks) -> None:
        """Takes what blocks hold as idle contents, those without their beginnings excepted.

        Leaves are evicted first, and of them those whose texts have not been added to for longest.
        """
        newest: dict[int, int] = {}  # by content: what was added to it last
        blocks: dict[int, int] = {}
        for node, block, parent, tokens in kept.read():
            self._next_node = node + 1
            if isinstance(parent, int) and parent not in blocks:
                kept.clear(block)
                continue
            edge = (parent, tokens)
            self._children[edge] = (node, block)
            self._edge_of_block[block] = edge
            newest[node], blocks[node] = node, block
            if self._events is not None:
                self._events.stored(node, parent, tokens)
        for node in reversed(blocks):  # descending
            parent, _ = self._edge_of_block[blocks[node]]
            if isinstance(parent, int):
                newest[parent] = max(newest[parent], newest[node])
        order = sorted(blocks, key=lambda node: (newest[node], -node))
        self._idle = OrderedDict.fromkeys(blocks[node] for node in order)
        self._plain = [block for block in self._plain if block not in self._idle]

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give, idle contents included."""
        return len(self._plain) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Blocks whose contents are known."""
        return len(self._edge_of_block)

    @property
    def num_usable(self) -> int:
        """Blocks in all, without the null block."""
        return self.num_blocks - 1

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each. Contents are evicted, oldest first, where needed."""
        assert count <= self.num_free, f"{count} blocks of {self.num_free} free"
        blocks = []
        for _ in range(count):
            if self._plain:
                block = self._plain.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                node, _ = self._children.pop(self._edge_of_block.pop(block))
                if self._events is not None:
                    self._events.removed(node)
                if self._kept is not None:
                    self._kept.clear(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: list[int]) -> None:
        """Gives up one reference to each. The last blocks of a text are evicted before the first ones."""
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} released twice"
            if self._references[block] == 0:
                if block in self._edge_of_block:
                    self._idle[block] = None
                else:
                    self._plain.append(block)

    def root(self, salt: str, owner: int) -> Root:
        """Where a request begins. Those that begin at the same node share blocks.

        Args:
            salt: of the request: only those that bring the same one share. '' is one too.
            owner: its number, or its group's for one of several choices: without caching only these share.
        """
        digest = sha256(salt.encode()).digest() if salt else _NO_SALT
        return Root(digest, None if self.caching else owner)

    def match(self, tokens: array[int], root: Root) -> tuple[list[int], Node]:
        """The longest cached prefix of `tokens` in whole blocks, and its node.

        At least one token is left over: its logits are what the request waits for. References are
        not taken; call `share` with the blocks, or with fewer, before anything else is allocated.
        """
        blocks: list[int] = []
        node: Node = root
        size = self.block_size
        for start in range(0, (len(tokens) - 1) // size * size, size):
            found = self._children.get((node, tokens[start : start + size].tobytes()))
            if found is None:
                break
            node, block = found
            blocks.append(block)
        return blocks, node

    def forget(self) -> None:
        """Nothing that has been computed, or is computed by plans on their way, is found any more: neither
        here nor by the next scheduler. Blocks in use stay whose they are; their owners must register no more.
        """
        if self._kept is not None:
            for block in self._edge_of_block:
                self._kept.clear(block)
        self._plain += reversed(self._idle)
        self._idle.clear()
        self._edge_of_block.clear()
        self._children.clear()
        if self._events is not None:
            self._events.cleared()

    def num_idle(self, blocks: list[int]) -> int:
        """How many of these blocks `share` would take from the free ones."""
        return sum(not self._references[block] for block in blocks)

    def share(self, blocks: list[int]) -> None:
        """Takes one more reference to each."""
        for block in blocks:
            if self._references[block] == 0:
                del self._idle[block]
            self._references[block] += 1

    def register(self, parent: Node, tokens: array[int], block: int, is_answered: bool = False) -> int:
        """Makes the content of a full block known: `tokens` after the text of `parent`. Returns its node.

        If that content is known from another block already, that one stays, and this stays private.
        Unless all plans that compute it have been answered, the table learns of it from `answered`.
        """
        edge = (parent, tokens.tobytes())
        found = self._children.get(edge)
        if found is not None:
            return found[0]
        node = self._next_node
        self._next_node += 1
        self._children[edge] = (node, block)
        self._edge_of_block[block] = edge
        if self._events is not None:
            self._events.stored(node, *edge)
        if self._kept is not None:
            if is_answered:
                self._kept.write(block, node, *edge)
            else:
                self._unanswered.append((block, node))
        return node

    def take_unanswered(self) -> list[tuple[int, int]]:
        """What was registered since the last call, and is computed by plans that are not answered yet: the
        blocks and their nodes. To be given to `answered`."""
        taken, self._unanswered = self._unanswered, []
        return taken

    def answered(self, registered: Iterable[tuple[int, int]]) -> None:
        """All plans that compute these have been answered. What has been evicted meanwhile stays unknown."""
        if self._kept is None:
            return
        for block, node in registered:
            edge = self._edge_of_block.get(block)
            if edge is not None and self._children[edge][0] == node:
                self._kept.write(block, node, *edge)

    def check_integrity(self, owned: list[list[int]]) -> None:
        """Asserts that every block is in exactly one place, given the block lists of all requests."""
        references = [0] * self.num_blocks
        for blocks in owned:
            assert len(set(blocks)) == len(blocks), "a request owns a block twice"
            for block in blocks:
                references[block] += 1
        assert references == self._references, "references do not match what requests own"
        free = [*self._plain, *self._idle]
        assert len(set(free)) == len(free), "a block is free twice"
        assert all(references[block] == 0 for block in free), "a free block is referenced"
        assert len(free) + sum(count > 0 for count in references) == self.num_usable, "a block is lost"
        assert 0 not in free, "the null block is free"
        assert references[0] == 0, "the null block was given away"
        assert all(block in self._edge_of_block for block in self._idle), "an idle block without content"
        assert not any(block in self._edge_of_block for block in self._plain), "a plain block with content"
        assert {block: edge for edge, (_, block) in self._children.items()} == self._edge_of_block
        for node, block, *edge in self._kept.read() if self._kept is not None else ():
            known = self._edge_of_block.get(block)
            assert known == tuple(edge), f"block {block} is not known to hold what the table says"
            assert self._children[known] == (node, block), f"block {block} is kept by another name"
