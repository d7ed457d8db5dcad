"""Options that the benchmarks share: what is out of range is refused before anything is measured."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable

STAND_IN_SIZES = (2, 4, 8)
"""TP sizes whose sums go through memory that the ranks share, as those of ranks that stand in must."""


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)  # what is no number, argparse tells
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too few: at least 1")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:  # nor NaN
        raise argparse.ArgumentTypeError(f"{text} is no share: from 0 to 1")
    return value


def shape(text: str) -> str:
    """MODEL:TP, e.g. `qwen3-8b:2`."""
    model, _, ranks = text.partition(":")
    if not model or not ranks.isdecimal() or int(ranks) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no MODEL:TP, such as qwen3-8b:2")
    return text


def add_stand_ins(parser: argparse.ArgumentParser) -> None:
    """The option of benchmarks of TP groups."""
    parser.add_argument(
        "--stand-ins",
        action="store_true",
        help="where GPUs are fewer than ranks, let each GPU's rank stand for several: kernels, and sums of "
        "decode steps, have the sizes of the whole group; what they compute means nothing (stand_ins.py)",
    )


def num_stand_ins(ranks: int, num_gpus: int, is_wanted: bool) -> int | None:
    """How many ranks stand for a TP group; 0: it runs as it is. None: it cannot run (`why_not`)."""
    if ranks <= num_gpus:
        return 0
    if not is_wanted or ranks not in STAND_IN_SIZES:
        return None
    return max((number for number in range(1, num_gpus + 1) if ranks % number == 0), default=None)


def why_not(ranks: int, num_gpus: int, is_wanted: bool) -> str:
    """Of a TP group of which `num_stand_ins` is None."""
    reason = f"TP {ranks} needs as many GPUs, and here are {num_gpus}"
    if ranks not in STAND_IN_SIZES:
        sizes = ", ".join(str(size) for size in STAND_IN_SIZES)
        return f"{reason} (--stand-ins is for TP {sizes})" if is_wanted else reason
    return reason if is_wanted else f"{reason}; with --stand-ins, any number would do"


def choose_stand_ins(sizes: Iterable[int], num_gpus: int, is_wanted: bool) -> dict[int, int]:
    """`num_stand_ins` of those of these TP sizes that can run; says of the others why they cannot.

    Empty: nothing is to be measured, and why has been said.
    """
    chosen: dict[int, int] = {}
    for size in dict.fromkeys(sizes):
        number = num_stand_ins(size, num_gpus, is_wanted)
        if number is None:
            print(f"left out: {why_not(size, num_gpus, is_wanted)}", file=sys.stderr)
        else:
            chosen[size] = number
    if is_wanted and chosen and not any(chosen.values()):
        print("--stand-ins would have no effect: there is a GPU for every rank", file=sys.stderr)
        return {}
    return chosen


def new_file(text: str) -> str:
    """A file that can be written, so that hours of measuring do not end in an error."""
    folder = os.path.dirname(os.path.abspath(text))
    if not os.access(folder, os.W_OK) or os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return text
