"""How a checkpoint's weights are quantised: the `quantization_config` of config.json. Imports no torch.

Two published forms of FP8 (E4M3) are read, both with activations that are quantised while serving:

    compressed-tensors   weight, weight_scale [out, 1]: a scale for each output channel
    fp8                  weight, weight_scale_inv [ceil(out / 128), ceil(in / 128)]: one for each block

In both a weight is its values times its scales. The first: vllm-project/compressed-tensors, the second:
DeepSeek-V3's report, arXiv 2412.19437.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NoReturn

from tpworker.errors import ModelError, shown
from tpworker.model.families.config import Config

FP8 = "fp8"
"""What `--quantization` names."""

_REMEDY = "use the model's float32, bfloat16 or float16 weights (--quantization fp8 makes FP8 of them)"
_SECTIONS = ("quantization_config", "compression_config")
_MAX_NAMES = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Weights in FP8: those of attention and MLPs, experts included, that are not `kept`."""

    block: int = 0
    """Rows and columns that have a scale in common; 0: each output channel has one."""
    scale: str = "weight_scale"
    """Published name of a weight's scales, behind the module's."""
    kept: tuple[str, ...] = ()
    """Regular expressions of published modules that are as they were, matched against whole names."""
    is_made: bool = False
    """The checkpoint is not quantised: weights are, each output channel by its greatest, as they are read."""

    def covers(self, module: str) -> bool:
        """Whether a module's weight, such as model.layers.0.mlp.down_proj's, is in FP8."""
        return not any(re.fullmatch(pattern, module) for pattern in self.kept)


MADE = Quantization(is_made=True)
"""Of a checkpoint that is not quantised, with `--quantization fp8`."""


def read_quantization(config: Config) -> Quantization | None:
    """What config.json says; None: weights are as they are. Raises ModelError: it is of another kind."""
    for key in _SECTIONS:
        section = config.section(key)
        if section is None or not section.values:
            continue
        method = section.get("quant_method")
        if method == "compressed-tensors":
            return _by_channel(section, key)
        if method == "fp8":
            return _by_block(section, key)
        _refuse(config, f"{key}, method {shown(method or 'unnamed')}")
    return None


def _by_channel(section: Config, key: str) -> Quantization:
    """Of compressed-tensors: one group of all linear layers."""
    groups = section.section("config_groups")
    found = [] if groups is None else list(groups.values.values())
    if len(found) != 1 or not isinstance(found[0], dict):
        _refuse(section, f"{key}: config_groups has {len(found)} groups, and one is supported")
    if section.get("kv_cache_scheme"):
        _refuse(section, f"{key}: kv_cache_scheme={shown(section.get('kv_cache_scheme'))}")
    group = section.part(found[0])
    if group.get("targets") not in (["Linear"], "Linear"):
        _refuse(section, f"{key}: targets={shown(group.get('targets'))}, not all Linear")
    weights, inputs = group.section("weights"), group.section("input_activations")
    _check_scheme(section, f"{key}: weights", weights, {"strategy": "channel", "dynamic": False})
    if inputs is not None:
        _check_scheme(section, f"{key}: input_activations", inputs, {"dynamic": True})
    ignored = _names(section, "ignore")
    return Quantization(kept=tuple(n[3:] if n.startswith("re:") else re.escape(n) for n in ignored))


def _check_scheme(section: Config, where: str, scheme: Config | None, wanted: dict[str, Any]) -> None:
    """Raises ModelError unless it is FP8 of this kind."""
    if scheme is None:
        _refuse(section, f"{where} are missing")
    for name, value in {"type": "float", "num_bits": 8, **wanted}.items():
        if (scheme.get(name) or False) != value:
            _refuse(section, f"{where}: {name}={shown(scheme.get(name))}, not {shown(value)}")


def _by_block(section: Config, key: str) -> Quantization:
    """Of `quant_method` fp8: with blocks."""
    size = section.get("weight_block_size")
    if not isinstance(size, list) or len(size) != 2 or size[0] != size[1] or size[0] not in (32, 64, 128):
        _refuse(section, f"{key}: weight_block_size={shown(size)}, not [128, 128]")
    for name, wanted in (("fmt", "e4m3"), ("activation_scheme", "dynamic")):
        if section.get(name) not in (None, wanted):
            _refuse(section, f"{key}: {name}={shown(section.get(name))}, not {wanted}")
    # A name may be a module's, that of all modules below it, or how several of them end.
    kept = tuple(
        f"(?:.*\\.)?{re.escape(name)}(?:\\..*)?" for name in _names(section, "modules_to_not_convert")
    )
    return Quantization(block=size[0], scale="weight_scale_inv", kept=kept)


def _names(section: Config, key: str) -> list[str]:
    names = section.get(key) or []
    if not isinstance(names, list) or len(names) > _MAX_NAMES or not all(isinstance(n, str) for n in names):
        section.fail(key, f"must be a list of at most {_MAX_NAMES} names")
    for name in names:
        try:
            re.compile(name.removeprefix("re:"))
        except re.error as error:
            section.fail(key, f"{shown(name)} is no regular expression: {error}")
    return names


def _refuse(config: Config, what: str) -> NoReturn:
    raise ModelError(
        f"{config.path}: the checkpoint is quantised ({what}), which is not supported. FP8 (E4M3) is, with a "
        "scale for each output channel (compressed-tensors) or for each block of 128 x 128 (fp8), and "
        f"activations quantised while serving; or {_REMEDY}"
    )
