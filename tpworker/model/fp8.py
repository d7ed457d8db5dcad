"""Weights in FP8 (E4M3): what they stand for, and how they are made of others."""

from __future__ import annotations

import torch
from torch import Tensor

from tpworker.errors import ConfigError
from tpworker.kernels.operands import Fp8Weight

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""Of E4M3, which has no infinity."""
_LEAST_CAPABILITY = (8, 9)
"""CUDA compute capability from which on GPUs convert E4M3, and Triton compiles kernels with it."""


def check_gpu(device: torch.device, weights: bool, cache: bool) -> None:
    """Before anything is loaded: whether this device can have weights, or keys and values, in FP8.

    Raises:
        ConfigError: it is a GPU that does not convert E4M3, and is to have some.
    """
    if device.type != "cuda" or not (weights or cache):
        return
    capability = torch.cuda.get_device_capability(device)
    if capability >= _LEAST_CAPABILITY:
        return
    what, remedy = "kv_cache_dtype=fp8", "leave the option out"
    if weights:
        what = "weights in FP8"
        remedy = "take a checkpoint in bfloat16 or float16, without quantization=fp8"
    raise ConfigError(
        f"{what}: {torch.cuda.get_device_name(device)} (compute capability {'.'.join(map(str, capability))}) "
        f"does not convert FP8 (E4M3); {'.'.join(map(str, _LEAST_CAPABILITY))} or later does: {remedy}"
    )


def dequantise(weight: Fp8Weight) -> Tensor:
    """What a weight stands for, [..., out, in], each element rounded once, to the weight's dtype."""
    values, (rows, columns) = weight.values.float(), weight.block
    scales = weight.scales.repeat_interleave(rows, dim=-2)[..., : values.shape[-2], :]
    if scales.shape[-1] > 1:
        scales = scales.repeat_interleave(columns, dim=-1)[..., : values.shape[-1]]
    return values.mul_(scales).to(weight.dtype)


def quantise(weight: Tensor) -> Fp8Weight:
    """A weight [..., out, in] in FP8: each output channel by its greatest element."""
    greatest = weight.abs().amax(dim=-1, keepdim=True).float()
    scales = torch.where(greatest > 0, greatest / LARGEST, 1.0)
    values = (weight.float() / scales).clamp_(-LARGEST, LARGEST).to(E4M3)
    return Fp8Weight(values, scales, (1, weight.shape[-1]), weight.dtype)
