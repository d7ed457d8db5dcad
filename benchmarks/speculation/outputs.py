"""What a plain Llama (plain_llama.py) says of many prompts at once, and its hidden states on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.speculation.plain_llama import Cache, Llama

_MARK = "<<question>>"


@dataclass(frozen=True, slots=True)
class Outputs:
    """Of N sequences of the same length L, prompt and output."""

    tokens: Tensor
    """int64 [N, L]"""
    hidden: Tensor
    """[N, L, D], behind the final norm."""
    prompt_lengths: Tensor
    """int64 [N], on the CPU."""

    def part(self, first: int, count: int) -> Outputs:
        """Of so many sequences, from `first` on."""
        rows = slice(first, first + count)
        return Outputs(self.tokens[rows], self.hidden[rows], self.prompt_lengths[rows])


class Tongue:
    """A model's tokenizer and chat template."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.end: int = self._tokenizer.eos_token_id
        asked: str = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
        )
        self._before, _, self._behind = asked.partition(_MARK)

    def chat(self, questions: Sequence[str | None]) -> list[list[int]]:
        """Conversations up to where the model answers; None: up to where somebody asks."""
        texts = [
            self._before if question is None else f"{self._before}{question}{self._behind}"
            for question in questions
        ]
        return self._tokenizer(texts, add_special_tokens=False)["input_ids"]

    def text(self, tokens: Sequence[int]) -> str:
        """Without special tokens."""
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


def noise(shape: Sequence[int], device: torch.device, draw: torch.Generator) -> Tensor:
    """Gumbel noise, whose sum with log-probabilities has its greatest at a sample of them; float32."""
    uniform = torch.rand(*shape, device=device, generator=draw).clamp_(1e-20, 1 - 1e-7)
    return uniform.log_().neg_().log_().neg_()


@torch.inference_mode()
def complete(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    length: int,
    temperatures: Sequence[float],
    draw: torch.Generator,
) -> Outputs:
    """Each prompt with what the model says behind it, whatever it is, up to `length` tokens.

    Args:
        prompts: of at least one token; what is beyond `length` is left out.
        temperatures: of each; 0: greedy.
    """
    device, count = model.device, len(prompts)
    like = model.lm_head.weight
    prompt_lengths = torch.tensor([min(len(prompt), length) for prompt in prompts])
    padded = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(prompt[:length]) for prompt in prompts], batch_first=True
    )
    tokens = torch.zeros(count, length, dtype=torch.int64)
    tokens[:, : padded.shape[1]] = padded
    tokens = tokens.to(device)
    hidden = like.new_empty(count, length, model.sizes.hidden_size)
    caches = [Cache.empty(model.sizes, count, length, like) for _ in model.layers]
    heat = torch.tensor(temperatures, device=device)[:, None]
    is_cold = bool((heat == 0).all())
    longest, given = int(prompt_lengths.max()), prompt_lengths.to(device)
    for position in range(length):
        hidden[:, position] = model.decode(tokens[:, position], caches, position)
        if position + 1 == length:
            break
        if position + 1 < int(prompt_lengths.min()):
            continue
        logits = model.logits(hidden[:, position])
        if not is_cold:
            logits += heat * noise(logits.shape, device, draw)
        said = logits.argmax(dim=-1)
        if position + 1 < longest:  # of some the prompt goes on
            said = torch.where(given > position + 1, tokens[:, position + 1], said)
        tokens[:, position + 1] = said
    return Outputs(tokens, hidden, prompt_lengths)


def lengths_of(outputs: Outputs, end: int) -> list[int]:
    """Of each sequence, up to the token that ends its output, that included."""
    lengths = []
    for row, prompt in zip(outputs.tokens.tolist(), outputs.prompt_lengths.tolist(), strict=True):
        lengths.append(row.index(end, prompt) + 1 if end in row[prompt:] else len(row))
    return lengths
