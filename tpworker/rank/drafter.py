"""Who makes drafts: guesses at the next tokens of slots, which the next step checks all at once.

They are made at the end of a step, from device state alone, and are device state: the host does not see them.
A guess that is wrong costs its share of a step and changes no token.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from tpworker.rank.slots import SlotTable


class Drafter(Protocol):
    """A way to make drafts."""

    def draft(self, slots: Tensor, num_drafts: int) -> None:
        """Writes drafts of slots (int64 [S]) into the slot table, from what the step has left there."""
        ...


class NgramDrafter:
    """From what sequences repeat, see `Operations.look_up`.

    Args:
        table: with a history.
        longest, shortest: n-grams that are looked up, tokens.
    """

    def __init__(self, table: SlotTable, longest: int, shortest: int) -> None:
        self._table = table
        self._longest = longest
        self._shortest = shortest

    def draft(self, slots: Tensor, num_drafts: int) -> None:
        """See `Drafter`."""
        table = self._table
        table.operations.look_up(slots, num_drafts, self._longest, self._shortest, table.state)
