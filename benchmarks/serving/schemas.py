"""Outputs held to JSON schemas: whether every one parses and validates, and what it costs.

A runtime, without HTTP; --outputs requests go over the schemas of the suite in turn, each with a seed of its
own, at temperature 1. Every output is judged by jsonschema, not by what has made the masks.

ended     the output is complete: it says `stop`
cut       max_tokens came first: it says `length`; so far nothing else is wrong with it
invalid   no JSON, or not of its schema, or it ended in any other way. One of these: exit status 1
tokens/s  with the schemas, and without: the same prompts and seeds, each with as many tokens as its output
          had. Of the first --compared outputs, in rounds that take turns; prompts included
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.cpu import Others
from benchmarks.common.options import positive
from benchmarks.common.report import machine, quantile, save
from benchmarks.serving.schema_suite import SUITE, Entry, kinds_of, read_suite
from tpworker import Runtime, SamplingParams, StructuredOutputs

NUM_ROUNDS = 3
"""Into which the compared outputs are cut."""
_SHOWN = 20
_LONGEST = 200  # characters of an output that is shown


def add_options(parser: argparse.ArgumentParser) -> None:
    """This benchmark's options."""

    def number(name: str, default: int, what: str) -> None:
        parser.add_argument(
            name, type=positive, default=default, metavar="N", help=f"{what}; default: {default}"
        )

    parser.add_argument("--model", help="a folder or a hub name; default: SmolLM2-135M-Instruct")
    number("--tensor-parallel-size", 1, "TP ranks")
    parser.add_argument("--load-format", choices=["auto", "dummy"], default="auto", help="default: auto")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="default: auto"
    )
    parser.add_argument("--lookahead", type=int, default=2, metavar="N", help="default: 2")
    number("--outputs", 1000, "outputs in all")
    number("--compared", 192, "of these, the first ones, are made again without schemas")
    number("--max-tokens", 200, "at which an output is cut")
    number("--concurrency", 64, "requests at a time")
    parser.add_argument("--temperature", type=float, default=1.0, help="default: 1")
    parser.add_argument("--suite", type=Path, default=SUITE, metavar="FILE",
                        help="schemas, a JSON list of {name, schema}; default: the tests' fifty")  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true", help="each schema once, 48 tokens, whatever else is said"
    )


@dataclass(frozen=True, slots=True)
class Output:
    """What came of one request."""

    name: str
    """Of its schema."""
    seed: int
    text: str
    num_tokens: int
    reason: str
    fault: str
    """What is wrong with it; '': nothing, as far as it goes."""


@dataclass(frozen=True, slots=True)
class Round:
    """Outputs that were asked for at once."""

    outputs: list[Output]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return sum(output.num_tokens for output in self.outputs) / self.seconds


def run(options: argparse.Namespace) -> int:
    """Measures, prints a table, writes the JSON file. 1: an output is invalid."""
    try:
        entries = read_suite(options.suite)
    except ValueError as error:
        print(f"schemas: {error}", file=sys.stderr)
        return 2
    if options.quick:
        options.outputs = options.compared = len(entries)
        options.max_tokens = 48
    where, others = machine(), Others()
    held, plain, rest = asyncio.run(_measure(entries, options))
    where["others"] = others.share()
    outputs = [output for each in (*held, *rest) for output in each.outputs]
    _print(entries, outputs, held, plain, options, where)
    speeds = {"with": held, "without": plain}
    save(
        options.json,
        {
            "machine": where,
            "options": {**vars(options), "suite": str(options.suite)},
            "tokens_per_second": {
                name: [each.tokens_per_second for each in rounds] for name, rounds in speeds.items()
            },
            "outputs": [asdict(output) for output in outputs],
        },
    )
    return int(any(output.fault for output in outputs))


# ---------------------------------------------------------------------------------------- measuring


async def _measure(
    entries: Sequence[Entry], options: argparse.Namespace
) -> tuple[list[Round], list[Round], list[Round]]:
    """Rounds with schemas, the same without, and further ones with."""
    asked = [(entries[seed % len(entries)], seed) for seed in range(options.outputs)]
    compared = min(options.compared, options.outputs)
    size = -(-compared // NUM_ROUNDS)
    held: list[Round] = []
    plain: list[Round] = []
    rest: list[Round] = []
    async with Runtime(
        options.model,
        tensor_parallel_size=options.tensor_parallel_size,
        device=options.device,
        dtype=options.dtype,
        load_format=options.load_format,
        lookahead=options.lookahead,
        max_num_seqs=options.concurrency,
        max_queue=options.outputs + 1,
        max_model_len=2048,
    ) as runtime:
        await asyncio.gather(*(_ask(runtime, entry, 0, 2) for entry in entries))  # compiles, and warms up
        for first in range(0, compared, size):
            part = asked[first : min(first + size, compared)]
            held.append(await _round(runtime, part, options))
            lengths = [output.num_tokens for output in held[-1].outputs]
            plain.append(await _round(runtime, part, options, lengths))
            print(f"{first + len(part)} of {options.outputs} done", file=sys.stderr)
        if compared < options.outputs:
            rest.append(await _round(runtime, asked[compared:], options))
    return held, plain, rest


async def _round(
    runtime: Runtime,
    asked: Sequence[tuple[Entry, int]],
    options: argparse.Namespace,
    lengths: Sequence[int] | None = None,
) -> Round:
    """All at once. `lengths`: of outputs that are held to nothing."""
    began = time.monotonic()
    if lengths is None:
        works = [_ask(runtime, entry, seed, options.max_tokens, options.temperature) for entry, seed in asked]
    else:
        pairs = zip(asked, lengths, strict=True)
        works = [
            _ask(runtime, entry, seed, n, options.temperature, is_held=False) for (entry, seed), n in pairs
        ]
    outputs = await asyncio.gather(*works)
    return Round(outputs, time.monotonic() - began)


async def _ask(
    runtime: Runtime, entry: Entry, seed: int, max_tokens: int, temperature: float = 1.0, is_held: bool = True
) -> Output:
    sampling = SamplingParams(
        temperature=temperature,
        top_p=1.0,
        top_k=0,
        seed=seed,
        max_tokens=max_tokens,
        ignore_eos=not is_held,
        structured_outputs=StructuredOutputs(json=entry.schema) if is_held else None,
    )
    text, tokens, reason = "", 0, "none"
    async for output in runtime.generate(entry.prompt, sampling):
        text += output.text
        tokens, reason = output.num_output_tokens, output.finish_reason or reason
    return Output(
        entry.name, seed, text, tokens, reason, _fault(entry, text, tokens, reason, max_tokens, is_held)
    )


def _fault(entry: Entry, text: str, tokens: int, reason: str, max_tokens: int, is_held: bool) -> str:
    """See `Output`."""
    if reason == "length" and tokens == max_tokens:
        return ""
    if reason != "stop" or not is_held:
        return f"{reason} after {tokens} tokens"
    return entry.why_invalid(text)


# ----------------------------------------------------------------------------------------- printing


def _counts(outputs: Sequence[Output]) -> tuple[int, int, int]:
    """How many ended, were cut, and are invalid."""
    found = Counter("invalid" if output.fault else output.reason for output in outputs)
    return found["stop"], found["length"], found["invalid"]


def _print(
    entries: Sequence[Entry],
    outputs: Sequence[Output],
    held: Sequence[Round],
    plain: Sequence[Round],
    options: argparse.Namespace,
    where: dict[str, Any],
) -> None:
    table = Table("kind of schema", caption="a schema may be of several kinds")
    for name in ("schemas", "outputs", "ended", "cut", "invalid", "tokens, mean"):
        table.add_column(name, justify="right")
    for kind, names in {**kinds_of(entries), "all": {entry.name for entry in entries}}.items():
        of_kind = [output for output in outputs if output.name in names]
        mean = sum(output.num_tokens for output in of_kind) / max(1, len(of_kind))
        table.add_row(kind, *map(str, (len(names), len(of_kind), *_counts(of_kind))), f"{mean:.0f}")
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for output in [output for output in outputs if output.fault][:_SHOWN]:
        what = f"invalid: {output.name}, seed {output.seed}: {output.fault}\n  {output.text[:_LONGEST]!r}"
        console.print(what, highlight=False, markup=False)
    with_, without = ([each.tokens_per_second for each in rounds] for rounds in (held, plain))
    told = (f"{quantile(each, 0.5):.4g} ({min(each):.4g} … {max(each):.4g})" for each in (with_, without))
    share = quantile([a / b for a, b in zip(with_, without, strict=True)], 0.5)
    console.print(
        "tokens/s with schemas {}, without {}: {:.2f} of it in the median round".format(*told, share),
        _what_ran(options),
        f"{where['cpu']}, {where['cores']} cores, load {where['load']:.1f} before, other programs took "
        f"{where['others']:.2f} cores meanwhile; Linux {where['kernel']}, Python {where['python']}, torch "
        f"{where['torch']}",
        where["command"],
        sep="\n",
        highlight=False,
    )


def _what_ran(options: argparse.Namespace) -> str:
    model = options.model or "SmolLM2-135M-Instruct"
    kind = "CPU ranks" if options.device == "cpu" else "GPUs"
    return (
        f"{model}, {options.dtype}, {options.tensor_parallel_size} {kind}, "
        f"lookahead {options.lookahead}, {options.concurrency} requests at a time, "
        f"temperature {options.temperature:g}, at most {options.max_tokens} tokens"
    )
