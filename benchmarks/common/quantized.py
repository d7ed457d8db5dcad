"""Dummy weights in FP8: the option of the benchmarks that can have them."""

from __future__ import annotations

import argparse
from dataclasses import replace

from tpworker.model.families import MADE, ModelSpec, Quantization


def add_quantization(parser: argparse.ArgumentParser) -> None:
    """See `quantized`."""
    parser.add_argument(
        "--quantization",
        choices=("fp8", "fp8-blocks"),
        help="weights in FP8, with a scale for each output channel, or for each block of 128 x 128",
    )


def quantized(spec: ModelSpec, quantization: str | None) -> ModelSpec:
    """The model with its weights in FP8, if the option says so."""
    if quantization is None:
        return spec
    return replace(spec, quantization=MADE if quantization == "fp8" else Quantization(block=128))
