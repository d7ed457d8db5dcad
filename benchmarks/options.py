"""Options that the benchmarks share: what is out of range is refused before anything is measured."""

from __future__ import annotations

import argparse
import os


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)  # what is no number, argparse tells
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too few: at least 1")
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
        help="where GPUs are fewer than ranks, let each GPU's rank stand for several: every kernel and all "
        "sums are of the sizes of the whole group, what they compute means nothing (see stand_ins.py)",
    )


def num_stand_ins(ranks: int, num_gpus: int, is_wanted: bool) -> int | None:
    """How many ranks stand for a TP group; 0: it runs as it is. None: there are not enough GPUs."""
    if ranks <= num_gpus:
        return 0
    return num_gpus if is_wanted and num_gpus and ranks % num_gpus == 0 else None


def new_file(text: str) -> str:
    """A file that can be written, so that hours of measuring do not end in an error."""
    folder = os.path.dirname(os.path.abspath(text))
    if not os.access(folder, os.W_OK) or os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return text
