"""How outputs are sampled and where they end, as generation_config.json and config.json say it.

What ends an output, in the order of precedence; `transformers` is as installed for the tests:

- `eos_token_id` of generation_config.json, else of config.json, as transformers' `generate` has it: the one
  hides the other. (Where generation_config.json is there but names none, `generate` never ends; here
  config.json counts.)
- besides, the tokenizer's EOS (`ModelSpec.ended_by`), which `generate` does not know of: a chat model may
  have been tuned to end with it, and nobody wants what comes behind it.
- if none of the three names any, and config.json does not say null: the default of the config class of
  transformers, e.g. 2 for a LlamaForCausalLM.

An id that the vocabulary does not have (some write -1 for none) cannot be sampled, so it ends nothing; it is
told of.
"""

from __future__ import annotations

from typing import Any

from tpworker.errors import shown
from tpworker.model.families.config import Config
from tpworker.model.families.spec import MAX_EOS_IDS

MAX_TEMPERATURE = 100
MAX_TOP_K = 2**31 - 1
"""What a request may ask for, a model's defaults may ask for, and no more."""
LEAST_TOP_P = 1e-12
"""Keeps the most probable token alone: the mass before the second one is more than that."""

_DEFAULT_EOS = {
    "Ernie4_5ForCausalLM": 2,
    "Ernie4_5_MoeForCausalLM": 2,
    "Gemma2ForCausalLM": 1,
    "Gemma3ForCausalLM": 1,
    "Gemma3ForConditionalGeneration": 1,
    "LlamaForCausalLM": 2,
    "MistralForCausalLM": 2,
    "MixtralForCausalLM": 2,
    "Phi3ForCausalLM": 32000,
}
"""Of the config classes of transformers; the others have none."""

# What generation_config.json may set, that would change the output and that is not done, with the values at
# which it changes nothing.
_NOT_DONE: dict[str, tuple[Any, ...]] = {
    "encoder_repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "guidance_scale": (1.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "stop_strings": ([], ""),
}


def read_defaults(generation: Config) -> dict[str, float]:
    """What sets them of temperature, top_p, top_k, min_p and repetition_penalty.

    Raises:
        ModelError: one is out of range.
    """
    defaults: dict[str, float] = {}
    temperature = generation.get("temperature")
    if temperature is not None:
        defaults["temperature"] = 0.0 if temperature == 0 else generation.number("temperature")
        if defaults["temperature"] > MAX_TEMPERATURE:
            generation.fail("temperature", f"must be at most {MAX_TEMPERATURE}")
    if generation.get("do_sample") is not None and not generation.get("do_sample"):
        defaults["temperature"] = 0.0
    if generation.get("top_p") is not None:
        defaults["top_p"] = max(generation.number("top_p", minimum=0.0), LEAST_TOP_P)
        if defaults["top_p"] > 1:
            generation.fail("top_p", "must be at least 0 and at most 1")
    if generation.get("top_k") is not None:  # -1 is how many write 0: all tokens
        top_k = generation.integer("top_k", minimum=-1, maximum=MAX_TOP_K, whole_floats=True)
        defaults["top_k"] = max(0, top_k)
    if generation.get("min_p") is not None:
        defaults["min_p"] = generation.number("min_p", minimum=0.0)
        if defaults["min_p"] > 1:
            generation.fail("min_p", "must be at least 0 and at most 1")
    if generation.get("repetition_penalty") is not None:
        defaults["repetition_penalty"] = generation.number("repetition_penalty")
        if not 0.01 <= defaults["repetition_penalty"] <= 100:
            generation.fail("repetition_penalty", "must be at least 0.01 and at most 100")
    return defaults


def read_ignored(generation: Config) -> dict[str, object]:
    """What is set, would change the output and is not done."""
    return {
        key: generation.get(key)
        for key, neutral in _NOT_DONE.items()
        if generation.get(key) is not None and generation.get(key) not in neutral
    }


def read_ends(config: Config, generation: Config, vocab_size: int) -> tuple[dict[str, Any], list[str]]:
    """The fields of `ModelSpec` about special tokens, and what is to be told of them. Raises ModelError."""
    notes: list[str] = []

    def ids(file: Config, key: str) -> tuple[int, ...]:
        named = file.ids(key)
        found = tuple(dict.fromkeys(i for i in named if 0 <= i < vocab_size))
        if len(found) < len(set(named)) and key == "eos_token_id":
            notes.append(
                f"{file.path}: {key}={shown(file.get(key))}: the vocabulary has ids from 0 to "
                f"{vocab_size - 1}; others are never generated, and end nothing"
            )
        return found

    bos_ids = ids(config, "bos_token_id") or ids(generation, "bos_token_id")
    eos_ids = ids(generation, "eos_token_id")
    place = generation
    if not eos_ids:
        eos_ids, place = ids(config, "eos_token_id"), config
    if len(eos_ids) > MAX_EOS_IDS:
        place.fail("eos_token_id", f"names {len(eos_ids)} tokens; at most {MAX_EOS_IDS} can end an output")
    is_default = not eos_ids and "eos_token_id" not in config.values
    if is_default:
        default = _DEFAULT_EOS.get(config.values["architectures"][0], vocab_size)
        eos_ids = (default,) if default < vocab_size else ()
    ends = {"bos_id": bos_ids[0] if bos_ids else None, "eos_ids": eos_ids, "eos_is_default": is_default}
    return ends, notes
