"""Numbers of tokens that ranks capture steps with prompts for, and that the scheduler prefers."""

from __future__ import annotations


def step_ladder(most: int) -> list[int]:
    """Numbers of tokens that mixed steps are captured for, ascending, up to `most`.

    Close to each other: products take time for padding too, and a capture some 20 ms.
    """
    sizes = [16, *range(32, 512, 32), *range(512, 2048, 64), *range(2048, most, 256)]
    return [*(size for size in sizes if size < most), most]
