"""Rotary positions (Su et al., arXiv 2104.09864): the angles of all positions, in tables to look up."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tpworker.model.families import LinearScaling, Llama3Scaling, LongRopeScaling, RopeSpec, YarnScaling


def rope_tables(
    rope: RopeSpec, head_dim: int, num_positions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles: float32 [num_positions, rotary_dim] each.

    Both halves hold the same angles; the first half of the sines is negated, so that x * cos + swapped * sin
    is the rotation. Tables of YaRN and LongRoPE are longer or shorter than 1 by their attention factor, as in
    transformers.
    """
    rotary_dim = rope.rotary_dim or head_dim
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    frequencies = 1.0 / (rope.theta**exponents)
    length = 1.0
    match rope.scaling:
        case LinearScaling(factor=factor):
            frequencies = frequencies / factor
        case Llama3Scaling():
            frequencies = _llama3(frequencies, rope.scaling)
        case YarnScaling():
            frequencies = _yarn(frequencies, rope.theta, rope.scaling)
            length = rope.scaling.attention_factor
        case LongRopeScaling(factors=factors, attention_factor=length):
            frequencies = 1.0 / (torch.tensor(factors) * rope.theta**exponents)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    cos, sin = angles.cos() * length, angles.sin() * length
    return torch.cat((cos, cos), dim=-1).to(device), torch.cat((-sin, sin), dim=-1).to(device)


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """`apply_scaling` of Meta's llama-models."""
    wavelengths = 2 * math.pi / frequencies
    context = scaling.original_max_position_embeddings
    # 0: a wavelength of context / low_freq_factor or more, to be stretched; 1: one of
    # context / high_freq_factor or less, to be kept; in between, a mixture of both.
    kept = (context / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    kept = kept.clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _yarn(frequencies: Tensor, theta: float, scaling: YarnScaling) -> Tensor:
    """`_compute_yarn_parameters` of transformers: a ramp over the pairs, by how often each turns."""
    num_pairs = len(frequencies)

    def pair_of(turns: float) -> float:
        """The pair, as a fraction, that turns so often within the original context."""
        wavelength = math.log(scaling.original_max_position_embeddings) - math.log(turns)
        return num_pairs * (wavelength - math.log(2 * math.pi)) / math.log(theta)

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * num_pairs - 1)  # the second bound is transformers', too
    if first == last:
        last += 0.001
    stretched = ((torch.arange(num_pairs, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    return frequencies / scaling.factor * stretched + frequencies * (1 - stretched)
