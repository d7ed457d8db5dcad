"""What is agreed on about drafts: which numbers of them a plan may have, so that ranks are ready for each."""

from __future__ import annotations

MOST_ROWS = 512
"""A plan with drafts samples at most so many rows, the first tokens of its slots included. Logits of a large
vocabulary are what takes most memory in a step; and of so many requests the GPU has enough to do."""


def draft_choices(num_drafts: int) -> tuple[int, ...]:
    """How many drafts a plan may have, ascending: none, all, and halves of that. E.g. 4: 0, 1, 2, 4."""
    choices = [num_drafts]
    while choices[-1]:
        choices.append(choices[-1] // 2)
    return tuple(reversed(choices))


def most_drafts(choices: tuple[int, ...], num_sampled: int, most_rows: int = MOST_ROWS) -> int:
    """The most of these that a plan may have for which up to `num_sampled` slots are sampled.

    Args:
        most_rows: that it may sample, if that is less.
    """
    most_rows = min(most_rows, MOST_ROWS)
    return max(drafts for drafts in choices if not drafts or num_sampled * (1 + drafts) <= most_rows)
