"""Sliding windows: which layers have one, from the keys of config.json, as each family's class reads them."""

from __future__ import annotations

from tpworker.errors import shown
from tpworker.model.families.config import Config
from tpworker.model.families.spec import MAX_LENGTH, WindowSpec, with_article

FULL, SLIDING = "full_attention", "sliding_attention"


def read_window(
    config: Config, num_layers: int, *, absent: int | None = None, used: bool = True
) -> WindowSpec | None:
    """A window of every layer, where there is a sliding_window: Mistral's way.

    Args:
        absent: what an absent sliding_window means.
        used: whether the window is used at all.

    Raises:
        ModelError: layer_types say otherwise, or it is no window.
    """
    size = _read_size(config, absent) if used else None
    _check_types(config, num_layers, FULL if size is None else SLIDING)
    return None if size is None else WindowSpec(size=size, layers=tuple(range(num_layers)))


def read_window_of_some(
    config: Config, num_layers: int, absent_types: list[str], *, absent: int | None, used: bool = True
) -> WindowSpec | None:
    """A window of those layers that layer_types call sliding_attention: the way of Qwen2, Qwen3 and Gemma.

    Args:
        absent_types: what absent layer_types mean, if the window is used.
        absent: what an absent sliding_window means.
        used: whether the window is used at all.

    Raises:
        ModelError: layer_types are no such list, or some slide and there is no window.
    """
    size = _read_size(config, absent) if used else None
    types = config.get("layer_types")
    if types is None:
        types = absent_types if used else [FULL] * num_layers
    elif (
        not isinstance(types, list) or len(types) != num_layers or not set(map(str, types)) <= {FULL, SLIDING}
    ):
        config.fail("layer_types", f"must be a list of {num_layers} times {FULL} or {SLIDING}")
    layers = tuple(number for number, kind in enumerate(types) if kind == SLIDING)
    if not layers:
        return None
    if size is None:
        why = "" if used else " with use_sliding_window"
        config.fail("sliding_window", f"is required{why}: {len(layers)} layers are of {SLIDING}")
    return WindowSpec(size=size, layers=layers)


def types_from(num_layers: int, first: int) -> list[str]:
    """Layers from number `first` on slide."""
    return [FULL if number < first else SLIDING for number in range(num_layers)]


def refuse_sliding_window(config: Config, architecture: str, num_layers: int) -> None:
    """Raise ModelError if some layer would not see every earlier token, in a family that has no windows."""
    _check_types(config, num_layers, FULL)
    window = config.get("sliding_window")
    if window is None or config.get("use_sliding_window") is False:
        return
    if not isinstance(window, int) or window < config.integer("max_position_embeddings", maximum=MAX_LENGTH):
        config.fail(
            "sliding_window",
            f"is not supported in {with_article(architecture)}; a copy of the folder with "
            f"sliding_window=null and max_position_embeddings={shown(window)} gives the same output within "
            "the window",
        )


def _read_size(config: Config, absent: int | None) -> int | None:
    """Tokens; None: there is no window."""
    if "sliding_window" not in config.values:
        return absent
    if config.get("sliding_window") is None:
        return None
    return config.integer("sliding_window", maximum=MAX_LENGTH)


def _check_types(config: Config, num_layers: int, kind: str) -> None:
    """Raise ModelError if layer_types, which the family does not read, contradict it."""
    types = config.get("layer_types")
    if types is not None and (not isinstance(types, list) or any(item != kind for item in types)):
        config.fail(
            "layer_types", f"must be absent or a list of {kind}, which is what all {num_layers} layers have"
        )
