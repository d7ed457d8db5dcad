"""Trains a head for multi-token prediction of a small Llama on the model's own outputs.

By turns the model writes texts (seeds.py) and the head learns from them: to tell, from the hidden states that
the model had and the tokens that it chose, the distribution of the token behind (cross entropy with the
model's own). It is one layer, which begins as the model's last. At the end drafts are counted that would be
right, on prompts of which none was learnt from (agreement.py says what the columns are); and the head's
tensors are written, which --merge puts into a folder with the model, to be served with
--speculative-method mtp.

Needs torch, transformers and safetensors; and a GPU, unless --quick is for a glance.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common.options import new_file, positive
from benchmarks.common.report import machine, save
from benchmarks.speculation.agreement import Agreement, judge, told
from benchmarks.speculation.head_files import merge, save_head
from benchmarks.speculation.outputs import Outputs, Tongue, complete, lengths_of
from benchmarks.speculation.plain_llama import Head, Llama
from benchmarks.speculation.seeds import draw_prompts

TEMPERATURES = (0.0, 0.7, 1.0)
"""At which texts are written, a third each."""
MOST_PASSAGES = 2000
_PASSAGE = (200, 900)  # characters of a text that may be copied
_WARM_UP = 0.03  # share of the time in which the rate of learning rises


@dataclass(frozen=True, slots=True)
class Round:
    """What is written, and learnt from, at a time."""

    tokens: int
    """Of all texts."""
    lengths: tuple[int, ...]
    """Of a text, prompt and all, by turns from round to round."""
    batch: int
    """Tokens of a step of learning."""


WHOLE = Round(1_280_000, (320, 320, 320, 1024), 16_384)
QUICK = Round(2_048, (64,), 512)


def add_options(parser: argparse.ArgumentParser) -> None:
    """This benchmark's options."""
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--minutes", type=float, default=3.0, metavar="M", help="of training; default: 3")
    parser.add_argument("--rate", type=float, default=1e-3, help="of learning, the highest; default: 0.001")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--head", type=new_file, metavar="FILE", help="to be written: the head's tensors")
    parser.add_argument("--judged", type=positive, default=512, metavar="N",
                        help="tokens of a text by which the head is judged; default: 512")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="small rounds, whatever comes of it")
    parser.add_argument(
        "--merge", type=Path, metavar="FILE", help="do not train: put this file's head beside the model"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="with --merge: to be written")


def run(options: argparse.Namespace) -> int:
    """Trains, tells and writes; or merges."""
    if (options.merge is None) != (options.out is None):
        print("distill: --merge and --out belong together", file=sys.stderr)
        return 2
    folder = options.model or _default_model()
    try:
        if options.merge is not None:
            merge(folder, options.merge, options.out)
            return 0
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = Llama.read(folder, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    except (OSError, ValueError) as error:
        print(f"distill: {error}", file=sys.stderr)
        return 2
    where = machine()
    draw = torch.Generator(device).manual_seed(options.seed)
    tongue, head = Tongue(folder), Head.beginning(model)
    began, seconds = time.monotonic(), 60 * options.minutes
    losses = train(model, head, tongue, options, draw, lambda: (time.monotonic() - began) / seconds)
    if options.head:
        save_head(head, Path(options.head))
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        found = judge(model, head, tongue, options.judged, draw, options.quick)
    print_table(found)
    settings = {key: value for key, value in vars(options).items() if isinstance(value, int | float)}
    save(options.json, {"machine": where, "options": settings, "losses": losses, "agreement": told(found)})
    return 0


def _default_model() -> Path:
    from tpworker.checkpoint.default_model import ensure_default_model

    return ensure_default_model(lambda text, fraction: None)


# ------------------------------------------------------------------------------------------ learning


def train(
    model: Llama,
    head: Head,
    tongue: Tongue,
    options: argparse.Namespace,
    draw: torch.Generator,
    passed: Callable[[], float],
) -> list[float]:
    """Until all of the time has passed. Returns the mean loss of each round.

    Args:
        head: is changed.
        passed: the share of the time that has passed.
    """
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.01)
    losses: list[float] = []
    for texts in written(model, tongue, QUICK if options.quick else WHOLE, random.Random(options.seed), draw):
        of_round = []
        for batch in _batches(texts, (QUICK if options.quick else WHOLE).batch):
            share = passed()
            if share >= 1:
                break
            optimizer.param_groups[0]["lr"] = options.rate * _rate(share)
            of_round.append(_learn(model, head, optimizer, *batch))
        if of_round:
            losses.append(float(torch.stack(of_round).mean()))
            print(
                f"{passed():.0%}: {len(of_round)} steps, loss {losses[-1]:.4f}", file=sys.stderr, flush=True
            )
        if passed() >= 1:
            return losses
    raise AssertionError("the model never stops writing")


def written(
    model: Llama, tongue: Tongue, size: Round, shuffle: random.Random, draw: torch.Generator
) -> Iterator[Outputs]:
    """One round of texts after another, for ever."""
    passages: list[str] = []
    for number in count():
        length = size.lengths[number % len(size.lengths)]
        many = max(1, size.tokens // length)
        prompts = tongue.chat(draw_prompts(shuffle, many, passages))
        heats = [TEMPERATURES[row % len(TEMPERATURES)] for row in range(many)]
        outputs = complete(model, prompts, length, heats, draw)
        yield outputs
        passages = (_passages(outputs, tongue, shuffle) + passages)[:MOST_PASSAGES]


def _passages(outputs: Outputs, tongue: Tongue, shuffle: random.Random) -> list[str]:
    """Some of the texts, as they may be copied: each a few hundred characters of an output."""
    ends = lengths_of(outputs, tongue.end)
    rows = shuffle.sample(range(len(ends)), min(len(ends), MOST_PASSAGES // 2))
    shortest, longest = _PASSAGE
    texts = []
    for row in rows:
        start = int(outputs.prompt_lengths[row])
        texts.append(tongue.text(outputs.tokens[row, start : ends[row]].tolist())[:longest].strip())
    return [text for text in texts if len(text) >= shortest]


def _batches(texts: Outputs, num_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and hidden states of some texts after others."""
    many = max(1, num_tokens // texts.tokens.shape[1])
    yield from zip(texts.tokens.split(many), texts.hidden.split(many), strict=True)


def _rate(share: float) -> float:
    """Of the highest rate, when so much of the time has passed: it rises, and falls as a cosine does."""
    if share < _WARM_UP:
        return max(share, 0.0) / _WARM_UP + 1e-3
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (share - _WARM_UP) / (1 - _WARM_UP))) / 2


def _learn(
    model: Llama, head: Head, optimizer: torch.optim.Optimizer, tokens: Tensor, hidden: Tensor
) -> Tensor:
    """One step; returns its loss, in nats a token."""
    device = tokens.device
    tokens, hidden = tokens.clone(), hidden.clone()  # as what is learnt from, no inference tensors
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        guessed = head(model.embed_tokens(tokens[:, 1:]), hidden[:, :-1])
        with torch.no_grad():
            wanted = model.logits(hidden[:, 1:]).softmax(dim=-1)
        loss = -(wanted * model.logits(guessed).log_softmax(dim=-1)).sum(dim=-1).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


# ------------------------------------------------------------------------------------------- telling


def print_table(found: list[Agreement]) -> None:
    """A line for each kind of prompt and temperature."""
    table = Table("prompts", title="Drafts that would be right, one draft each, %")
    for name in ("temperature", "drafts", "coupled", "likeliest", "apart"):
        table.add_column(name, justify="right")
    for each in found:
        shares = (f"{100 * share:.1f}" for share in (each.coupled, each.likeliest, each.apart))
        table.add_row(each.kind, f"{each.temperature:g}", str(each.positions), *shares)
    Console(width=100).print(table)
