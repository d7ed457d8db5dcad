"""How the products of a mixture of experts are cut up on CUDA."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tpworker.kernels.operands import Fp8Weight

Weights = Tensor | Fp8Weight
_SHORTEST_STEP = 32  # inputs: the least that products in FP8 take


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut up: BLOCK columns a program, STEP of the inner dimension at a time."""

    block: int
    step: int
    num_warps: int
    num_stages: int

    def options(self, weight: Weights) -> dict[str, int]:
        """What a kernel is launched with, for this weight; a step is shortened to the inputs of a scale."""
        step, rows, columns = self.step, 0, 0
        if isinstance(weight, Fp8Weight):
            (rows, columns), size_in = weight.block, weight.values.shape[-1]
            columns = 0 if columns >= size_in else columns
            if columns:
                step = min(step, max(columns, _SHORTEST_STEP))
        return {
            "SCALE_ROWS": rows,
            "SCALE_COLUMNS": columns,
            "BLOCK": self.block,
            "STEP": step,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """How the experts' products are computed."""

    rows: int
    """Most choices of a tile, all of one expert."""
    is_sorted: bool
    """`_group` sorts the choices; else programs find them, among at most `rows` tokens."""
    gate_up: Tile
    down: Tile
    rounds_inputs: bool = False
    """x and act are brought to FP8, each row by its greatest element, and multiplied so."""


def plan(num_tokens: int, num_choices: int, dtype: torch.dtype, gate_up: Weights, down: Weights) -> Plan:
    """The fastest of a few dozen on an H200: of 16 bits for GLM-4.5-Air and ERNIE-4.5-21B-A3B at TP 4, in FP8
    for GLM-4.5-Air and Qwen3-30B-A3B at TP 1."""
    num_stacked = len(down if isinstance(down, Tensor) else down.values)
    if dtype == torch.float32:  # without matrix units, and twice the memory
        tiles = (Tile(16, 32, 4, 2), Tile(32, 32, 4, 2))
        return Plan(16, False, *tiles) if num_tokens <= 16 else Plan(32, True, *tiles)
    if isinstance(gate_up, Fp8Weight) and isinstance(down, Fp8Weight):
        inputs_of_scale = min(_inputs_of_scale(gate_up), _inputs_of_scale(down))
        return _plan_fp8(num_tokens, num_choices / num_stacked, inputs_of_scale)
    if num_tokens <= 16:
        return Plan(16, False, Tile(32, 128, 4, 3), Tile(128, 64, 4, 4))
    if num_tokens <= 32:
        return Plan(32, False, Tile(32, 128, 4, 4), Tile(128, 64, 4, 4))
    if num_tokens <= 64:
        return Plan(16, True, Tile(64, 128, 8, 3), Tile(128, 64, 4, 4))
    if num_choices <= 32 * num_stacked:
        return Plan(32, True, Tile(32, 64, 4, 4), Tile(64, 64, 4, 4))
    if num_choices <= 96 * num_stacked:
        return Plan(64, True, Tile(64, 64, 8, 4), Tile(128, 64, 4, 3))
    return Plan(128, True, Tile(64, 64, 8, 3), Tile(128, 64, 4, 3))


def _plan_fp8(num_tokens: int, choices_of_expert: float, inputs_of_scale: float) -> Plan:
    """Of weights in FP8. Inputs of few tokens are multiplied as they are, and all where scales are many."""
    narrow = Tile(32, 128, 4, 3), Tile(64, 128, 4, 3)
    if num_tokens <= 32:
        return Plan(16 if num_tokens <= 16 else 32, False, *narrow)
    if num_tokens <= 64:
        return Plan(16, True, *narrow)
    rounds = inputs_of_scale >= _SHORTEST_STEP
    if choices_of_expert <= 24:
        return Plan(32, True, Tile(64, 128, 4, 3), Tile(128, 128, 4, 3), rounds)
    if choices_of_expert <= 96 or inputs_of_scale < math.inf:  # sums of each scale's inputs take registers
        return Plan(64, True, Tile(64, 128, 4, 3), Tile(128, 128, 4, 3), rounds)
    return Plan(128, True, Tile(64, 128, 4, 3), Tile(128, 128, 4, 3), rounds)


def _inputs_of_scale(weight: Fp8Weight) -> float:
    """How many inputs of an output have a scale in common; infinite: all."""
    columns = weight.block[1]
    return columns if columns < weight.values.shape[-1] else math.inf
