"""How many tokens a step drafts bring with a real model, on three kinds of prompts.

The prompts are those of texts/: copying and editing a passage, code, chat; each is asked greedily and at
temperature 0.7, without drafts first. With look-ups, what comes of any setting can be told from these outputs
alone (replay.py), which are the same with drafts; --measured runs, and with heads all, go through a runtime.

tokens     of a request and step: 1, and the drafts that were right
drafted    share of the steps that had drafts
right      how often a draft was right where all before it were, by position; of auto, whose steps have now
           more and now fewer drafts, nobody counts it
precision  of all drafts, those that were right
differ     outputs that are not those without drafts; in float32 none may

Exit status 1: some output differs in float32.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.options import positive
from benchmarks.common.report import machine, save
from benchmarks.speculation.replay import LookUp, Tally, replay
from benchmarks.speculation.salted_scheduler import AUTO
from benchmarks.speculation.texts import KINDS, read_prompts
from benchmarks.steps.drafts import num_drafts, why_not_together
from tpworker import Runtime, RuntimeConfig, SamplingParams
from tpworker.checkpoint.default_model import ensure_default_model
from tpworker.outputs import Stats
from tpworker.runtime.settings import Speculation
from tpworker.text.tokenizer import Tokenizer

LOOK_UPS = tuple(
    LookUp(*lengths) for lengths in ((1, 1), (2, 1), (2, 2), (3, 1), (4, 1), (4, 2), (4, 3), (8, 1), (8, 2))
)
_DEFAULTS = Speculation.of(RuntimeConfig(speculative_method="ngram"))
SERVED = LookUp(_DEFAULTS.prompt_lookup_max, _DEFAULTS.prompt_lookup_min)
"""What is looked up where nothing is said."""
ALL = "all"
"""Kinds and temperatures together."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """This benchmark's options."""
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--method", choices=["ngram", "mtp"], default="ngram", help="default: ngram")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="default: float32"
    )
    parser.add_argument("--tensor-parallel-size", type=positive, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--max-tokens", type=positive, default=200, metavar="N", help="of an output; default: 200"
    )
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.7], help="default: 0 0.7")
    parser.add_argument(
        "--prompts", type=positive, default=8, metavar="N", help="of each kind; default: all, 8"
    )
    parser.add_argument("--drafts", type=num_drafts, nargs="+", default=[1, 2, 4, 8], metavar="N",
                        help="that are replayed; default: 1 2 4 8")  # fmt: skip
    parser.add_argument("--look-ups", type=look_up, nargs="+", metavar="MAX/MIN", default=list(LOOK_UPS),
                        help="n-grams that are replayed; default: several from 1/1 to 8/2")  # fmt: skip
    parser.add_argument("--shown", type=look_up, default=SERVED, metavar="MAX/MIN",
                        help=f"n-grams of runs, and of what is told by kind; default: {SERVED}")  # fmt: skip
    parser.add_argument("--measured", type=num_drafts, nargs="*", metavar="N",
                        help="drafts of runs; default: 4, or 1 2 4 of a head")  # fmt: skip
    parser.add_argument(
        "--auto", action="store_true", help="one more run, whose drafts the scheduler chooses"
    )


def look_up(text: str) -> LookUp:
    """MAX/MIN, e.g. 4/2."""
    longest, _, shortest = text.partition("/")
    if not longest.isdecimal() or not shortest.isdecimal() or not 1 <= int(shortest) <= int(longest):
        raise argparse.ArgumentTypeError(f"{text!r} is no MAX/MIN of n-grams, such as 4/2")
    return LookUp(int(longest), int(shortest))


@dataclass(frozen=True, slots=True)
class Asked:
    """One request."""

    kind: str
    temperature: float
    tokens: tuple[int, ...]
    number: int

    @property
    def group(self) -> Group:
        return self.kind, self.temperature


Group = tuple[str, float]
Tallies = dict[tuple[str, float | str], Tally]
"""By kind and temperature."""
Replays = dict[tuple[LookUp, int], Tallies]
Runs = dict[str, tuple[Tallies, int]]
"""By the number of drafts, with how many outputs differ."""


def run(options: argparse.Namespace) -> int:
    """Measures, prints the tables, writes the JSON file. 1: an output differs that may not."""
    if options.measured is None:
        options.measured = [4] if options.method == "ngram" else [1, 2, 4]
    if options.measured and (reason := why_not_together(options.measured)):
        print(f"acceptance: {reason}", file=sys.stderr)
        return 2
    folder = options.model or ensure_default_model(lambda text, fraction: None)
    where = machine()
    asked = prompts_of(folder, options)
    outputs = asyncio.run(_plain(folder, asked, options))
    replays: Replays = {}
    if options.method == "ngram":
        for each in dict.fromkeys([*options.look_ups, options.shown]):
            for drafts in options.drafts:
                replays[each, drafts] = replayed(asked, outputs, each, drafts)
    measured = asyncio.run(_measured(folder, asked, outputs, options))
    lengths = lengths_of(asked, outputs)
    _print(options, lengths, replays, measured)
    report = [
        {"look_up": str(each), "drafts": drafts, **told(tallies)}
        for (each, drafts), tallies in replays.items()
    ]
    runs = [
        {"drafts": name, "differ": differ, **told(tallies)} for name, (tallies, differ) in measured.items()
    ]
    save(
        options.json,
        {
            "machine": where,
            "options": {key: str(value) for key, value in vars(options).items()},
            "lengths": {f"{kind} {heat:g}": each for (kind, heat), each in lengths.items()},
            "replayed": report,
            "measured": runs,
        },
    )
    is_exact = options.dtype == "float32"
    return int(is_exact and any(differ for _, differ in measured.values()))


def prompts_of(folder: Path, options: argparse.Namespace) -> list[Asked]:
    """Every prompt at every temperature."""
    tokenizer, numbers = Tokenizer.load(folder), count(1)
    return [
        Asked(kind, temperature, tuple(_chat(tokenizer, text)), next(numbers))
        for kind in KINDS
        for temperature in options.temperature
        for text in read_prompts(kind)[: options.prompts]
    ]


def _chat(tokenizer: Tokenizer, text: str) -> list[int]:
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": text}])
    return tokenizer.encode(rendered, add_special_tokens=False)


def replayed(asked: Sequence[Asked], outputs: Sequence[Sequence[int]], each: LookUp, drafts: int) -> Tallies:
    """What would have come of drafts."""
    tallies: Tallies = {}
    for request, output in zip(asked, outputs, strict=True):
        _add(tallies, request, replay(request.tokens, output, each, drafts))
    return tallies


def _add(tallies: Tallies, request: Asked, tally: Tally) -> None:
    for group in (request.group, (ALL, ALL)):
        tallies.setdefault(group, Tally())
        tallies[group] += tally


# ---------------------------------------------------------------------------------------- running


async def _plain(folder: Path, asked: Sequence[Asked], options: argparse.Namespace) -> list[list[int]]:
    """The outputs without drafts."""
    async with Runtime(folder, **_settings(options)) as runtime:
        found = await asyncio.gather(*(_ask(runtime, request, options) for request in asked))
    return [tokens for tokens, _ in found]


async def _measured(
    folder: Path, asked: Sequence[Asked], outputs: Sequence[Sequence[int]], options: argparse.Namespace
) -> Runs:
    """What came of drafts, by how many there were."""
    runs: Runs = {}
    names = [*map(str, options.measured), *([AUTO] if options.auto else [])]
    if not names:
        return runs
    most = max(options.measured, default=None)
    settings = {"speculative_method": options.method, "num_speculative_tokens": most}
    if options.method == "ngram":
        settings |= {"prompt_lookup_max": options.shown.longest, "prompt_lookup_min": options.shown.shortest}
    async with Runtime(folder, **_settings(options), **settings) as runtime:
        for name in names:
            tallies: Tallies = {}
            differ = 0
            for group in dict.fromkeys(request.group for request in asked):
                before = runtime.stats()
                of_group = [(a, o) for a, o in zip(asked, outputs, strict=True) if a.group == group]
                found = await asyncio.gather(
                    *(_ask(runtime, request, options, name) for request, _ in of_group)
                )
                differ += sum(
                    tokens != list(output) for (tokens, _), (_, output) in zip(found, of_group, strict=True)
                )
                _add(tallies, of_group[0][0], _tally(before, runtime.stats(), found))
            runs[name] = (tallies, differ)
            print(
                f"{options.method}, {name} drafts: done, {differ} outputs differ", file=sys.stderr, flush=True
            )
    return runs


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "device": options.device,
        "dtype": options.dtype,
        "tensor_parallel_size": options.tensor_parallel_size,
        "max_num_seqs": 32,
        "max_model_len": 2048,
        "max_queue": 1000,
        "scheduler_module": "benchmarks.speculation.salted_scheduler",
    }


async def _ask(
    runtime: Runtime, request: Asked, options: argparse.Namespace, drafts: str = "0"
) -> tuple[list[int], int]:
    """Its output, and how many drafts of it were right."""
    sampling = SamplingParams(
        temperature=request.temperature,
        top_p=1.0,
        top_k=0,
        seed=request.number,
        max_tokens=options.max_tokens,
        cache_salt=drafts,
    )
    tokens: list[int] = []
    accepted = 0
    async for output in runtime.generate(list(request.tokens), sampling):
        tokens += output.token_ids
        accepted = output.num_accepted_tokens
    return tokens, accepted


def _tally(before: Stats, after: Stats, found: Sequence[tuple[list[int], int]]) -> Tally:
    """Of some outputs that a runtime gave. Drafts are counted as the scheduler does, who has a few more:
    those of steps that were on their way when an output ended."""
    drafts = _since(before.draft_tokens, after.draft_tokens)
    accepted = _since(before.accepted_tokens, after.accepted_tokens)
    tokens = sum(len(output) - 1 for output, _ in found)
    steps = tokens - sum(right for _, right in found)
    return Tally(tokens, steps, min(steps, drafts[0]), drafts, accepted)


def _since(before: Sequence[int], after: Sequence[int]) -> Counter[int]:
    earlier = before or (0,) * len(after)
    return Counter(
        {place: late - early for place, (late, early) in enumerate(zip(after, earlier, strict=True))}
    )


# ---------------------------------------------------------------------------------------- telling


def told(tallies: Tallies) -> dict[str, Any]:
    """As JSON has it."""
    return {
        f"{kind} {temperature}": {
            "steps": tally.steps,
            "drafted": tally.drafted / max(1, tally.steps),
            "tokens_a_step": tally.tokens_a_step,
            "acceptance": tally.acceptance,
            "precision": tally.precision,
        }
        for (kind, temperature), tally in tallies.items()
    }


def lengths_of(asked: Sequence[Asked], outputs: Sequence[Sequence[int]]) -> dict[Group, tuple[int, int, int]]:
    """By kind and temperature: requests, tokens of their prompts, tokens of their outputs."""
    lengths: dict[Group, tuple[int, int, int]] = {}
    for request, output in zip(asked, outputs, strict=True):
        many, given, said = lengths.get(request.group, (0, 0, 0))
        lengths[request.group] = many + 1, given + len(request.tokens), said + len(output)
    return lengths


def _print(
    options: argparse.Namespace, lengths: dict[Group, tuple[int, int, int]], replays: Replays, runs: Runs
) -> None:
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(_table_of_settings(list(lengths), replays)) if replays else None
    table = Table("prompts", title=f"By kind, n-grams of {options.shown}" if replays else "By kind")
    for name in ("T", "requests", "prompt", "output", "drafts", "tokens", "drafted", "right", "precision"):
        table.add_column(name, justify="right")
    rows = [
        (f"{drafts} (replayed)", tallies)
        for (each, drafts), tallies in replays.items()
        if each == options.shown
    ]
    rows += [(name, tallies) for name, (tallies, _) in runs.items()]
    for group, (many, given, said) in lengths.items():
        for name, tallies in rows:
            tally = tallies[group]
            right = " ".join(f"{share:.2f}" for share in tally.acceptance) if name != AUTO else "–"
            table.add_row(
                group[0], f"{group[1]:g}", str(many), f"{given / many:.0f}", f"{said / many:.0f}", name,
                f"{tally.tokens_a_step:.2f}", f"{tally.drafted / max(1, tally.steps):.2f}", right,
                f"{tally.precision:.2f}",
            )  # fmt: skip
    console.print(table)
    for name, (_, differ) in runs.items():
        console.print(f"{options.method}, {name} drafts: {differ} outputs differ from those without drafts")


def _table_of_settings(groups: list[Group], replays: Replays) -> Table:
    """Tokens of a step, a line each setting."""
    table = Table("n-grams", "drafts", title="Tokens of a request and step, replayed")
    for kind, temperature in groups:
        table.add_column(f"{kind} {temperature:g}", justify="right")
    for name in (ALL, "drafted", "precision"):
        table.add_column(name, justify="right")
    for (each, drafts), tallies in replays.items():
        every = tallies[ALL, ALL]
        cells = [f"{tallies[group].tokens_a_step:.2f}" for group in groups]
        cells += [
            f"{every.tokens_a_step:.3f}",
            f"{every.drafted / every.steps:.2f}",
            f"{every.precision:.2f}",
        ]
        table.add_row(str(each), str(drafts), *cells)
    return table
