"""--speculative-config: what the single options say, as JSON, in the words of vLLM and FastDeploy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tpworker.errors import ConfigError, shown

_OWN_HEAD = frozenset(
    ["mtp", "nextn"]
    + [f"{family}_mtp" for family in ("deepseek", "glm4_moe", "ernie", "qwen3_next", "mimo", "longcat_flash")]
)
"""Names of methods that all mean the model's own next-token layer."""

_OTHER_DRAFTERS = frozenset(
    ["draft_model", "eagle", "eagle3", "medusa", "mlp_speculator", "suffix", "dflash", "hybrid", "naive"]
)

_KEYS = "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"

_FLAG = "--speculative-config"
_METHODS = (
    "drafts come from n-grams (method ngram, any model) or from the model's own next-token layer (method mtp)"
)

_ADAPTIVE = "not needed: how many drafts a step has is chosen by what they cost and how many are right"
_ACCEPTED = "not needed: outputs are those without drafts, whatever the sampling"

_OTHER_KEYS = {
    "model": f"a second model cannot draft: {_METHODS}",
    "decoding_type": "the key here is method, ngram or mtp",
    "max_draft_len": "the key here is num_speculative_tokens",
    "num_nextn_predict_layers": "the key here is num_speculative_tokens",
    "max_matching_ngram_size": "the key here is prompt_lookup_max",
    "max_ngram_size": "the key here is prompt_lookup_max",
    "min_ngram_size": "the key here is prompt_lookup_min",
    "draft_tensor_parallel_size": "not needed: the ranks that check drafts make them",
    "disable_by_batch_size": _ADAPTIVE,
    "disable_padded_drafter_batch": _ADAPTIVE,
    "acceptance_method": _ACCEPTED,
    "rejection_sample_method": _ACCEPTED,
    "posterior_threshold": _ACCEPTED,
    "posterior_alpha": _ACCEPTED,
    "enforce_eager": "not needed: steps on GPUs are always graph replays",
    "max_model_len": "not an option: there are drafts up to --max-model-len",
    "quantization": "not an option: a head is in FP8 where the model is (--quantization fp8)",
}
"""Keys that other engines have, and what holds here instead."""


def speculation_in(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options with what --speculative-config says in its place, if it is given.

    Raises:
        ConfigError: it cannot be read, or an option says the same.
    """
    options = dict(given)
    if (text := options.pop("speculative_config", None)) is None:
        return options
    for name in ("speculative_method", *_KEYS):
        if name in options:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{_FLAG} and {flag} are both given: leave out one, and say it in the other")
    return options | options_of(text)


def options_of(text: str) -> dict[str, Any]:
    """What a value of --speculative-config says, as fields of `RuntimeConfig`.

    Raises:
        ConfigError: it is no JSON object, has a key or a method that there is not, or is of the wrong type.
    """
    settings = _parsed(text)
    if unknown := [key for key in settings if key != "method" and key not in _KEYS]:
        known = f"no such key; there are method, {', '.join(_KEYS)}"
        said = "; ".join(f"{shown(key)}: {_OTHER_KEYS.get(key, known)}" for key in unknown)
        raise ConfigError(f"{_FLAG}: {said}: leave it out")
    if "method" not in settings:
        raise ConfigError(f"{_FLAG}: it has no method; {_METHODS}")
    return {"speculative_method": _method(settings.pop("method"))} | {
        key: _whole_number(key, value) for key, value in settings.items()
    }


def _parsed(text: str) -> dict[str, Any]:
    example = f'{_FLAG} \'{{"method": "ngram", "num_speculative_tokens": 4}}\''
    try:
        settings = json.loads(text, object_pairs_hook=_object)
    except ConfigError:
        raise
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ConfigError(f"{_FLAG} {shown(text)}: must be a JSON object, as {example}")
    return settings


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise ConfigError(f"{_FLAG}: {shown(twice)} is there twice: leave out one")
    return dict(pairs)


def _method(given: object) -> str:
    name = given.lower() if isinstance(given, str) else ""
    if name in _OWN_HEAD:
        return "mtp"
    if name == "ngram":
        return "ngram"
    if name in _OTHER_DRAFTERS or name.endswith("_mtp"):
        raise ConfigError(f"{_FLAG}: method {shown(given)} is not supported: {_METHODS}")
    raise ConfigError(f"{_FLAG}: method {shown(given)}: must be ngram or mtp; {_METHODS}")


def _whole_number(key: str, value: object) -> object:
    if value is not None and type(value) is not int:
        raise ConfigError(f"{_FLAG}: {key} {shown(value)}: must be a whole number")
    return value
