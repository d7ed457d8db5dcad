"""How often a head would be right: on prompts that it has not learnt from, in plain torch.

A draft is right where it is the token that the model chooses. Without a temperature that is the likeliest of
each. With one, the model's choice is the greatest of logits / T + noise, and the head may make its own

    coupled      with the same noise, which depends on seed and position alone: what tpworker does
    likeliest    without noise
    apart        with noise of its own
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.speculation.outputs import Outputs, Tongue, complete, lengths_of, noise
from benchmarks.speculation.plain_llama import Head, Llama
from benchmarks.speculation.texts import KINDS, read_prompts

TEMPERATURES = (0.0, 0.7, 1.0)
SAMPLES = 4
"""Outputs of each prompt at temperatures above 0."""
_ROWS = 2048
"""Positions whose logits are computed at once."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Shares of the drafts that are right."""

    kind: str
    temperature: float
    positions: int
    coupled: float
    likeliest: float
    apart: float


@torch.inference_mode()
def judge(
    model: Llama, head: Head, tongue: Tongue, length: int, draw: torch.Generator, is_quick: bool = False
) -> list[Agreement]:
    """Of each kind of prompt, at each temperature.

    Args:
        length: at which sequences are cut, prompt and output.
        is_quick: one prompt of each kind, once.
    """
    asked: list[str] = []
    groups: list[tuple[str, float, int]] = []  # kind, temperature, how many
    for kind, temperature in product(KINDS, TEMPERATURES):
        prompts = read_prompts(kind)
        prompts = prompts[:1] if is_quick else prompts * (SAMPLES if temperature else 1)
        groups.append((kind, temperature, len(prompts)))
        asked += prompts
    heats = [temperature for _, temperature, many in groups for _ in range(many)]
    outputs = complete(model, tongue.chat(asked), length, heats, draw)
    found, first = [], 0
    for kind, temperature, many in groups:
        found.append(_judge(model, head, outputs.part(first, many), tongue.end, kind, temperature, draw))
        first += many
    return found


def _judge(
    model: Llama, head: Head, outputs: Outputs, end: int, kind: str, temperature: float, draw: torch.Generator
) -> Agreement:
    tokens, hidden = outputs.tokens, outputs.hidden
    guessed = head(model.embed_tokens(tokens[:, 1:]), hidden[:, :-1].clone())
    # Row i of both: what stands at i + 2, which is part of the output, and not its first token.
    place = torch.arange(2, tokens.shape[1] + 1)
    lengths = torch.tensor(lengths_of(outputs, end))
    counts = (place > outputs.prompt_lengths[:, None]) & (place < lengths[:, None])
    rows = counts.to(tokens.device)
    true, drafted = hidden[:, 1:][rows], guessed[rows]
    right = torch.zeros(3, dtype=torch.int64)
    for first in range(0, len(true), _ROWS):
        part = slice(first, first + _ROWS)
        right += _count(model.logits(true[part]), model.logits(drafted[part]), temperature, draw).cpu()
    shares = (right / max(1, len(true))).tolist()
    return Agreement(kind, temperature, len(true), *shares)


def _count(true: Tensor, drafted: Tensor, temperature: float, draw: torch.Generator) -> Tensor:
    """int64 [3]: how many are right, in the order of `Agreement`. Logits: [R, V]."""
    shared = temperature * noise(true.shape, true.device, draw)
    other = temperature * noise(true.shape, true.device, draw)
    chosen = (true + shared).argmax(dim=-1)
    drafts = torch.stack(
        [(drafted + added).argmax(dim=-1) for added in (shared, torch.zeros_like(shared), other)]
    )
    return (drafts == chosen).sum(dim=-1)


def told(found: list[Agreement]) -> list[dict[str, Any]]:
    """As JSON has it."""
    return [asdict(each) for each in found]
