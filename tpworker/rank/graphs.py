"""Steps made ready for a few sizes: on CUDA each is a graph, replayed with one call.

A batch that is between two sizes is padded with the null slot, and what a batch's sampling needs is rounded
up to a mode that has been captured: rows are not affected by what they do not need.

    decode step    one graph, by number of slots, of drafts, and sampling mode
    mixed step     two: the forward, by number of tokens; then sampling, as decode steps. A third, where a
                   model's head makes drafts: the head, by number of tokens and of drafts

At a first start all are captured before the first plan, which takes seconds. After a restart requests wait
for that plan: the first step of a kind runs as it is, padded as its graph will be, and is captured behind it.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from tpworker.ipc.drafting import MOST_ROWS
from tpworker.ipc.step_sizes import step_ladder
from tpworker.model.sampling import SamplingMode
from tpworker.rank.device import Device

GREEDY = SamplingMode(False, False, False)
MODES = (
    SamplingMode(True, True, True, True, True, True),
    SamplingMode(True, True, True),
    SamplingMode(True, False, False),
    GREEDY,
)
"""Those that are captured, the one that needs most memory first."""


_MODES_OF_DRAFTS = (MODES[0], MODES[1], GREEDY)
"""The same for steps with drafts: captures take time, and memory."""


def ladder(most: int) -> list[int]:
    """Batch sizes to capture, ascending, up to `most`: close to each other where steps are short."""
    sizes = [1, 2, 4, 8, *range(16, 64, 16), *range(64, 256, 32), *range(256, most, 64)]
    return [*(size for size in sizes if size < most), most]


MOST_TOKENS = 8192
"""A mixed step of more is launched kernel by kernel: with so many the GPU is busy for far longer than the
host needs. (One H200 with a slow host. Qwen3-0.6B: 10 ms of the host for any number of tokens, 0.5 ms with
graphs; the GPU takes 1.2 ms for 16 tokens, 4.4 ms for 963. Qwen3-8B: 12 and 0.6 ms; 4.6 ms for 16 tokens, 185
ms for 8192. But several such steps ahead of the GPU are more kernels than the driver's queue takes, and then
the host spins.)"""


def token_ladder(most: int) -> list[int]:
    """Numbers of tokens to capture, ascending, up to `most` or MOST_TOKENS."""
    return step_ladder(min(most, MOST_TOKENS))


_K = TypeVar("_K")

Backlog = list[Callable[[], None]]
"""Captures to be made, of what has run as it is. Their order is that of the plans, on all ranks the same, as
collectives have to be."""


@dataclass(frozen=True)
class _Late(Generic[_K]):
    """How kinds of steps are captured that have not been beforehand."""

    device: Device
    largest: _K
    step: Callable[[_K], None]
    backlog: Backlog


class _Graphs(Generic[_K]):
    """Replays by kind of step."""

    def __init__(self) -> None:
        self._replays: dict[_K, Callable[[], None]] = {}
        self._late: _Late[_K] | None = None

    def _find(self, kind: _K) -> Callable[[], None]:
        """A replay, or the first run of a kind, after which the backlog has its capture."""
        late = self._late
        if kind in self._replays or late is None:
            return self._replays[kind]

        def run() -> None:
            late.step(kind)
            late.backlog.append(partial(self._capture_one, late, kind))

        return run

    def _capture_one(self, late: _Late[_K], kind: _K) -> None:
        # All share one pool of memory: the others fit into what the largest has left.
        for one in (late.largest, kind):
            if one not in self._replays:
                self._replays[one] = late.device.capture_late(partial(late.step, one))


SlotKind = tuple[int, int, SamplingMode]
"""Number of slots, of drafts, and mode."""


class SlotGraphs(_Graphs[SlotKind]):
    """Replays by number of slots that are sampled, of drafts, and sampling mode; none before `capture`, or
    `capture_late`.

    Args:
        num_slots: in the largest batch.
        choices: how many drafts steps may have.
    """

    def __init__(self, num_slots: int, choices: tuple[int, ...]) -> None:
        super().__init__()
        self._sizes = {
            drafts: ladder(min(num_slots, MOST_ROWS // (1 + drafts)) if drafts else num_slots)
            for drafts in choices
        }

    def kinds(self) -> list[SlotKind]:
        """All that is captured, in the order of captures."""
        return [
            (size, drafts, mode)
            for drafts, sizes in sorted(self._sizes.items(), reverse=True)
            for mode in (_MODES_OF_DRAFTS if drafts else MODES)
            for size in reversed(sizes)
        ]

    def samples(self) -> list[SlotKind]:
        """A few of them, whose kernels are nearly all that there are: kernels are made for one row, for a
        multiple of 16, and for others."""
        return [kind for kind in self.kinds() if kind[0] in (1, 2, 16) or kind[0] == self._sizes[kind[1]][-1]]

    def capture(self, device: Device, step: Callable[[int, int, SamplingMode], None]) -> None:
        """Captures `step(size, drafts, mode)`, which samples for the first `size` slots of a batch, for all.

        The largest comes first: all share one pool of memory, and the others fit into what it has left.
        """
        for kind in self.kinds():
            self._replays[kind] = device.capture(partial(step, *kind))

    def capture_late(
        self, device: Device, step: Callable[[int, int, SamplingMode], None], backlog: Backlog
    ) -> None:
        """As `capture`, but each kind when it has been needed, by who works off the backlog."""
        self._late = _Late(device, self.kinds()[0], lambda kind: step(*kind), backlog)

    def find(self, count: int, drafts: int, mode: SamplingMode) -> Callable[[], None] | None:
        """What does a step of `count` slots: a replay, or its first run; None if nothing is captured."""
        if not self._replays and self._late is None:
            return None
        if mode.adjust or mode.logprobs:  # and what is guided is adjusted
            mode = MODES[0]
        elif mode.truncate or mode.suppress or (drafts and mode.random):
            mode = MODES[1]
        sizes = self._sizes[drafts]
        return self._find((sizes[bisect.bisect_left(sizes, count)], drafts, mode))


class TokenGraphs(_Graphs[int]):
    """Replays by number of tokens; none before `capture`, or `capture_late`."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: list[int] = []

    def capture(
        self, device: Device, most: int, fill: Callable[[int], None], step: Callable[[int], None]
    ) -> None:
        """Captures `step(size)`, a forward of `size` tokens, for sizes up to `most`, the largest first.

        Args:
            fill: puts such a step's input where `step` will find it.
        """
        for size in reversed(token_ladder(most)):
            fill(size)
            self._replays[size] = device.capture(partial(step, size))
        self._sizes = sorted(self._replays)

    def capture_late(self, device: Device, most: int, step: Callable[[int], None], backlog: Backlog) -> None:
        """As `capture`, but each size when it has been needed, by who works off the backlog."""
        self._sizes = token_ladder(most)
        self._late = _Late(device, self._sizes[-1], step, backlog)

    def size_for(self, count: int) -> int | None:
        """The size to which `count` tokens are padded; None if none is captured that is large enough."""
        index = bisect.bisect_left(self._sizes, count)
        return self._sizes[index] if index < len(self._sizes) else None

    def replay(self, size: int) -> None:
        """A forward of a size that is captured, or its first run."""
        self._find(size)()
