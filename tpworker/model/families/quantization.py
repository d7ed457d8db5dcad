"""How a checkpoint's weights are quantised: the `quantization_config` of config.json. Imports no torch.

Published forms of FP8 (E4M3) that are read, all with activations that are quantised while serving, if at all:

    compressed-tensors   weight, weight_scale: a scale for each output channel, [out, 1], for each block,
                         [ceil(out / 128), ceil(in / 128)], or one
    fp8                  weight, weight_scale_inv: one for each block; without blocks weight_scale: one

In all a weight is its values times its scales. The first: vllm-project/compressed-tensors, the second:
DeepSeek-V3's report, arXiv 2412.19437, and transformers' finegrained_fp8.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from tpworker.errors import ModelError, shown
from tpworker.model.families.config import Config

FP8 = "fp8"
"""What `--quantization` names."""

_REMEDY = "use the model's float32, bfloat16 or float16 weights (--quantization fp8 makes FP8 of them)"
_SECTIONS = ("quantization_config", "compression_config")
_MAX_NAMES = 100_000
_BLOCKS = (32, 64, 128)

# What a pattern may be, so that a search for one ends: three repetitions of single characters take 100,000
# steps of a module's name at the worst, repetitions of repetitions more than anybody waits for.
_MAX_PATTERNS = 32
_MAX_PATTERN = 256
_MAX_REPEATS = 3

Scales = Literal["channel", "block", "tensor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Weights in FP8: those of attention and MLPs, experts included, that are not `kept`."""

    scales: Scales = "channel"
    """What has a scale: each output channel, each block, or each published tensor."""
    block: int = 0
    """Rows and columns that have a scale in common, where blocks have."""
    name: str = "weight_scale"
    """Published name of a weight's scales, behind the module's."""
    kept: tuple[str, ...] = field(default=(), compare=False)
    """Modules that are as they were: whole parts of published names, one or more that follow each other."""
    kept_patterns: tuple[str, ...] = field(default=(), compare=False)
    """Regular expressions of such modules: of what their names begin with."""
    is_made: bool = False
    """The checkpoint is not quantised: weights are, each output channel by its greatest, as they are read."""
    _kept: frozenset[str] = field(init=False, repr=False, compare=False)
    _pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_kept", frozenset(self.kept))
        patterns = "|".join(f"(?:{pattern})" for pattern in self.kept_patterns)
        object.__setattr__(self, "_pattern", re.compile(patterns or "(?!)"))

    def covers(self, module: str) -> bool:
        """Whether a module's weight, such as model.layers.0.mlp.down_proj's, is in FP8."""
        parts, count = module.split("."), module.count(".") + 1
        names = {".".join(parts[i:j]) for i in range(count) for j in range(i + 1, count + 1)}
        return self._kept.isdisjoint(names) and self._pattern.match(module) is None


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
            return _of_compressed_tensors(section, key)
        if method == "fp8":
            return _of_fp8(section, key)
        _refuse(config, f"{key}, method {shown(method or 'unnamed')}")
    return None


def _of_compressed_tensors(section: Config, key: str) -> Quantization:
    """One group of all linear layers."""
    groups = section.section("config_groups")
    found = [] if groups is None else list(groups.values.values())
    if len(found) != 1 or not isinstance(found[0], dict):
        _refuse(section, f"{key}: config_groups has {len(found)} groups, and one is supported")
    if section.get("format") not in (None, "float-quantized", "naive-quantized"):
        _refuse(section, f"{key}: format={shown(section.get('format'))}")
    for name in ("kv_cache_scheme", "transform_config"):
        if section.get(name):
            _refuse(section, f"{key}: {name}={shown(section.get(name))}")
    sparsity = section.section("sparsity_config")
    if sparsity is not None and sparsity.get("format") not in (None, "dense"):
        _refuse(section, f"{key}: sparsity_config of format {shown(sparsity.get('format'))}")
    group = section.part(found[0])
    if group.get("targets") not in (["Linear"], "Linear"):
        _refuse(section, f"{key}: targets={shown(group.get('targets'))}, not all Linear")
    weights, inputs = group.section("weights"), group.section("input_activations")
    if weights is None:
        _refuse(section, f"{key}: weights are missing")
    _check_scheme(section, f"{key}: weights", weights, dynamic=False)
    if inputs is not None:
        _check_scheme(section, f"{key}: input_activations", inputs, dynamic=True)
    ignored = _names(section, "ignore")
    kept = tuple(name for name in ignored if not name.startswith("re:"))
    patterns = _patterns(section, "ignore", [name[3:] for name in ignored if name.startswith("re:")])
    strategy = weights.get("strategy")
    if strategy in ("channel", "tensor"):
        return Quantization(scales=strategy, kept=kept, kept_patterns=patterns)
    if strategy != "block":
        _refuse(section, f"{key}: weights: strategy={shown(strategy)}, not channel, block or tensor")
    block = _block(section, f"{key}: weights: block_structure", weights.get("block_structure"))
    return Quantization(scales="block", block=block, kept=kept, kept_patterns=patterns)


def _check_scheme(section: Config, where: str, scheme: Config, *, dynamic: bool) -> None:
    """Raises ModelError unless it is FP8 of this kind."""
    for name, value in {"type": "float", "num_bits": 8, "dynamic": dynamic, "symmetric": True}.items():
        if (scheme.get(name) if scheme.get(name) is not None else name == "symmetric") != value:
            _refuse(section, f"{where}: {name}={shown(scheme.get(name))}, not {shown(value)}")


def _of_fp8(section: Config, key: str) -> Quantization:
    """With blocks; or with one scale for each tensor."""
    for name, wanted in (("fmt", "e4m3"), ("activation_scheme", "dynamic")):
        if section.get(name) not in (None, wanted):
            _refuse(section, f"{key}: {name}={shown(section.get(name))}, not {wanted}")
    kept = (*_names(section, "modules_to_not_convert"), *_names(section, "ignored_layers"))
    size = section.get("weight_block_size")
    if size is None:
        return Quantization(scales="tensor", kept=kept)
    block = _block(section, f"{key}: weight_block_size", size)
    return Quantization(scales="block", block=block, name="weight_scale_inv", kept=kept)


def _block(section: Config, where: str, size: Any) -> int:
    """Of blocks of so many rows and as many columns. Raises ModelError: they are of another size."""
    block = next((b for b in _BLOCKS if size in ([b, b], f"{b}x{b}")), 0)
    if not block:
        _refuse(section, f"{where}={shown(size)}, not [128, 128]")
    return block


def _names(section: Config, key: str) -> list[str]:
    names = section.get(key) or []
    if not isinstance(names, list) or len(names) > _MAX_NAMES or not all(isinstance(n, str) for n in names):
        section.fail(key, f"must be a list of at most {_MAX_NAMES} names")
    return names


def _patterns(section: Config, key: str, patterns: list[str]) -> tuple[str, ...]:
    """The same, each of which compiles and ends soon."""
    if len(patterns) > _MAX_PATTERNS:
        section.fail(
            key, f"has {len(patterns)} patterns (re:…), more than {_MAX_PATTERNS}: name modules instead"
        )
    for pattern in patterns:
        plain = re.sub(r"\\.", "_", pattern)
        repeats = len(re.findall(r"[*+{]", plain))
        if len(pattern) > _MAX_PATTERN or repeats > _MAX_REPEATS or re.search(r"\)[*+{]", plain):
            section.fail(
                key,
                f"re:{shown(pattern)} may take too long: at most {_MAX_PATTERN} characters, and "
                f"{_MAX_REPEATS} repetitions (* + {{), none of a group: name the modules instead",
            )
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            section.fail(key, f"re:{shown(pattern)} is no regular expression: {error}")
    return tuple(patterns)


def _refuse(config: Config, what: str) -> NoReturn:
    raise ModelError(
        f"{config.path}: the checkpoint is quantised ({what}), which is not supported. FP8 (E4M3) is, with a "
        "scale for each output channel, each block of 128 x 128 or each tensor (compressed-tensors, fp8) and "
        f"activations quantised while serving; or {_REMEDY}"
    )
