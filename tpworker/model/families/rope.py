"""Rotary positions, as config.json asks for them. Imports no torch.

Of `dynamic` and `longrope`, transformers computes the angles of all positions anew when a sequence becomes
longer than a certain length: keys that a cache holds have then been rotated otherwise. What a sequence of at
most that length gets is computed; longer ones are not served (docs/models.md).
"""

from __future__ import annotations

import math

from tpworker.model.families.config import Config
from tpworker.model.families.spec import (
    MAX_LENGTH,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeSpec,
    YarnScaling,
)

_SCALED = ("linear", "dynamic", "yarn", "longrope", "llama3")
_ORIGINAL = "original_max_position_embeddings"


def read_rope(
    config: Config, head_dim: int, *, theta: float = 10000.0, partial_rotary: float | None = None
) -> RopeSpec:
    """Rotary positions, from the keys of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).

    As there, rope_scaling hides rope_parameters, its theta too, unless it is empty.

    Args:
        theta: what an absent rope_theta means.
        partial_rotary: what an absent partial_rotary_factor means; None: whole heads are rotated.

    Raises:
        ModelError: a value is wrong, or means positions that are not known of.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    section = config.section(key)
    theta = config.number("rope_theta", default=theta)
    rotary_dim = _read_rotary_dim(config, section, partial_rotary, head_dim)
    if section is None:
        return RopeSpec(theta=theta, rotary_dim=rotary_dim)
    if any(isinstance(value, dict) for value in section.values.values()):
        config.fail(key, "other rotary positions for each type of layer are not supported")
    return read_section(config, section, head_dim, theta=theta, rotary_dim=rotary_dim)


def read_section(
    config: Config, section: Config, head_dim: int, *, theta: float, rotary_dim: int | None = None
) -> RopeSpec:
    """Rotary positions as one section of `config` says them.

    Args:
        theta: what an absent rope_theta means.

    Raises:
        ModelError: a value is wrong, or means positions that are not known of.
    """
    theta = section.number("rope_theta", default=theta)
    kind = section.get("rope_type") or section.get("type") or "default"
    scaling: LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling | None = None
    max_positions = None
    if kind == "linear":
        scaling = LinearScaling(factor=section.number("factor"))
    elif kind == "llama3":
        scaling = _read_llama3(config, section)
    elif kind == "yarn":
        scaling = _read_yarn(config, section)
        if theta <= 1:
            source = section if "rope_theta" in section.values else config
            source.fail("rope_theta", "must be above 1 with yarn")
    elif kind == "longrope":
        max_positions = _original_length(config, section)
        scaling = _read_longrope(config, section, max_positions, rotary_dim or head_dim)
    elif kind == "dynamic":  # plain positions, up to the length from which on they are no longer
        section.number("factor")
        max_positions = config.integer("max_position_embeddings", maximum=MAX_LENGTH)
    elif kind != "default":
        key = "rope_type" if section.get("rope_type") else "type"
        section.fail(key, f"is not supported; of the scaled rotary positions {', '.join(_SCALED)} are")
    return RopeSpec(theta=theta, scaling=scaling, rotary_dim=rotary_dim, max_positions=max_positions)


def longest(rope: RopeSpec, max_length: int) -> int:
    """Positions that there can be, if config.json says `max_length`."""
    if isinstance(rope.scaling, YarnScaling):  # some configs leave the length as it was before
        length = rope.scaling.original_max_position_embeddings * rope.scaling.factor
        max_length = max(max_length, int(min(length, MAX_LENGTH)))
    return max_length if rope.max_positions is None else min(max_length, rope.max_positions)


def _read_llama3(config: Config, section: Config) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=section.number("factor"),
        low_freq_factor=section.number("low_freq_factor"),
        high_freq_factor=section.number("high_freq_factor"),
        original_max_position_embeddings=_original_length(config, section),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        section.fail("high_freq_factor", f"must be above low_freq_factor ({scaling.low_freq_factor:g})")
    return scaling


def _read_yarn(config: Config, section: Config) -> YarnScaling:
    original = _original_length(config, section)
    # DeepSeek's configs leave the factor to the two lengths.
    length = config.integer("max_position_embeddings", maximum=MAX_LENGTH)
    factor = section.number("factor", default=length / original)

    def sharpness(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    def optional(key: str) -> float | None:
        """None if it is absent, or 0, which comes to the same."""
        return section.number(key) if section.get(key) else None

    weight, weight_of_all = optional("mscale"), optional("mscale_all_dim")
    inferred = sharpness(1.0)
    if weight and weight_of_all:
        inferred = sharpness(weight) / sharpness(weight_of_all)
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=section.number("attention_factor", default=inferred),
        beta_fast=optional("beta_fast") or 32.0,
        beta_slow=optional("beta_slow") or 1.0,
        truncate=section.boolean("truncate", default=True),
    )


def _read_longrope(config: Config, section: Config, original: int, rotary_dim: int) -> LongRopeScaling:
    if original < 2:
        place = config if config.get(_ORIGINAL) is not None else section
        place.fail(_ORIGINAL, "must be at least 2: a prompt's token and one of the answer")
    for key in ("short_factor", "long_factor"):
        section.numbers(key, rotary_dim // 2)
    # Phi's configs leave the factor to the two lengths.
    length = config.integer("max_position_embeddings", maximum=MAX_LENGTH)
    factor = section.number("factor", default=length / original)
    inferred = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return LongRopeScaling(
        factors=section.numbers("short_factor", rotary_dim // 2),
        attention_factor=section.number("attention_factor", default=inferred),
    )


def _original_length(config: Config, section: Config) -> int:
    """Positions before the scaling: what stands beside the section counts more than what stands in it."""
    place = config if config.get(_ORIGINAL) is not None else section
    length = config.integer("max_position_embeddings", maximum=MAX_LENGTH)
    return place.integer(_ORIGINAL, default=length, maximum=MAX_LENGTH)


def _read_rotary_dim(
    config: Config, section: Config | None, partial: float | None, head_dim: int
) -> int | None:
    """How much of a head is rotated; None: all of it."""
    place = section if section is not None and section.get("partial_rotary_factor") is not None else config
    if partial is None:
        if place.get("partial_rotary_factor") not in (None, 1, 1.0):
            place.fail("partial_rotary_factor", "partial rotary positions are not supported")
        return None
    factor = place.number("partial_rotary_factor", default=partial)
    rotary_dim = int(head_dim * factor)
    if factor > 1 or rotary_dim < 2 or rotary_dim % 2:
        place.fail("partial_rotary_factor", f"must leave an even part of a head of {head_dim}")
    return rotary_dim if rotary_dim < head_dim else None
