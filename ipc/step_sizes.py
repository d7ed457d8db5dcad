"""Numbers of tokens that ranks capture steps with prompts for, and that the scheduler prefers."""

from __future__ import annotations


def step_ladder(most: int) -> list[int]:
    """Numbers of tokens that mixed steps are captured for, ascending, up to `most`.

    Close to each other where a step is short: products take time for padding too, and a capture some 20 ms.
    """
    sizes = [16, *range(32, 512, 32), *range(512, 1024, 64), *range(1024, 2048, 128)]
    sizes += [*range(2048, 4096, 512), *range(4096, most, 1024)]
    return [*(size for size in sizes if size < most), most]
