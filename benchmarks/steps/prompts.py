"""What steps of nothing but prompts cost one GPU, kernel by kernel, beside what their operations need.

Dummy weights, TP 1. Each case is a number of sequences, how many new tokens each has, and how many stand
before them in the cache: `8x1024`, `1x2048+6144`. The tables:

  steps      ms of a forward, launched kernel by kernel behind a warm-up; tokens a second; TFLOP/s of products
             and attention together, and their share of --peak, what a plain product reaches on this GPU
  parts      µs of the products of a layer alone, TFLOP/s of each, and of attention alone
  kernels    the profiler's time by kernel, in one forward
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common.options import positive
from benchmarks.common.quantized import add_quantization, quantized
from benchmarks.common.report import machine, save
from benchmarks.steps.kernels import CONFIGS
from tpworker.checkpoint.weights import dummy_weights
from tpworker.kernels.operands import Matrix
from tpworker.model.batch import Batch
from tpworker.model.decoder import Decoder
from tpworker.model.families import ModelSpec, read_spec
from tpworker.model.kv_cache import KVCache
from tpworker.model.mlp import Mlp
from tpworker.model.tp import Shard
from tpworker.rank.collectives import SoleRank

DEVICE = torch.device("cuda")


class Case(NamedTuple):
    """Sequences of one kind."""

    count: int
    new: int
    before: int

    @classmethod
    def read(cls, text: str) -> Case:
        """From `8x1024` or `1x2048+6144`."""
        try:
            count, rest = text.split("x")
            new, _, before = rest.partition("+")
            case = cls(int(count), int(new), int(before or 0))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not SEQUENCESxNEW or SEQUENCESxNEW+BEFORE"
            ) from None
        if case.count < 1 or case.new < 1 or case.before < 0:
            raise argparse.ArgumentTypeError(f"{text!r}: sequences and their new tokens are 1 or more")
        return case

    def __str__(self) -> str:
        return f"{self.count}x{self.new}" + (f"+{self.before}" if self.before else "")

    @property
    def tokens(self) -> int:
        return self.count * self.new

    def attention_flops(self, spec: ModelSpec) -> float:
        """Of all layers: scores and their sums, of a token with those before it and itself."""
        pairs = self.count * (self.new * self.before + self.new * (self.new + 1) / 2)
        return 4.0 * pairs * spec.num_heads * spec.head_dim * spec.num_layers


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="qwen3-8b", help="a folder of configs/, without experts")
    parser.add_argument(
        "--cases",
        type=Case.read,
        nargs="+",
        default=[Case(1, 512, 0), Case(2, 1024, 0), Case(8, 1024, 0), Case(1, 8192, 0), Case(1, 2048, 6144)],
    )
    parser.add_argument("--block-size", type=positive, default=16)
    add_quantization(parser)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--peak", type=float, default=790.0, help="TFLOP/s of a plain product (default: 790)")
    parser.add_argument("--profile", action="store_true", help="print the time by kernel")


def run(options: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("a GPU is needed, and there is none here", file=sys.stderr)
        return 1
    console = Console(width=150)
    spec = quantized(read_spec(CONFIGS / options.model), options.quantization)
    shard = Shard.of(spec, 0, 1)
    with torch.inference_mode():
        weights = dummy_weights(spec, shard, torch.bfloat16, DEVICE)
        most = max(case.new + case.before for case in options.cases)
        decoder = Decoder(spec, weights, shard, SoleRank(), most + 64)
        rows = [measure(decoder, case, options, console) for case in options.cases]
    print_tables(options.model, rows, console)
    save(options.json, {"machine": machine() | {"gpu": torch.cuda.get_device_name()}, "rows": rows})
    return 0


def measure(decoder: Decoder, case: Case, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """One case's row."""
    spec = decoder.spec
    batch = batch_of(case, options.block_size)
    num_blocks = batch.block_tables.numel() + 1
    cache = KVCache(spec, decoder.shard, num_blocks, options.block_size, torch.bfloat16, DEVICE)
    for layer in (*cache.keys, *cache.values):
        layer.normal_()
    seconds = times(lambda: decoder.forward(batch, cache), options.rounds)
    products = product_times(decoder, case.tokens, options.rounds)
    flops = spec.num_layers * sum(flop for _, flop in products.values()) + case.attention_flops(spec)
    median = statistics.median(seconds)
    row: dict[str, Any] = {"case": str(case), "tokens": case.tokens, "ms": [1000 * s for s in seconds]}
    row |= {"tokens_per_second": case.tokens / median, "tflops": flops / median / 1e12}
    row["share"] = row["tflops"] / options.peak
    row["products"] = {name: (1e6 * s, flop / s / 1e12) for name, (s, flop) in products.items()}
    attended = statistics.median(times(attention_of(decoder, batch, cache), options.rounds)) / spec.num_layers
    row["attention"] = (1e6 * attended, case.attention_flops(spec) / spec.num_layers / attended / 1e12)
    if options.profile:
        row["kernels"] = by_kernel(lambda: decoder.forward(batch, cache))
        for name, (count, us) in list(row["kernels"].items())[:14]:
            console.print(f"{case!s:>14}  {us / 1000:8.2f} ms  {count:5}  {name[:110]}", highlight=False)
    return row


def batch_of(case: Case, block_size: int) -> Batch:
    """A step of these sequences alone, whose blocks are scattered over the cache."""
    width = -(-(case.new + case.before) // block_size)
    tables = (torch.randperm(case.count * width, device=DEVICE) + 1).view(case.count, width)
    starts = case.new * torch.arange(case.count + 1, dtype=torch.int32, device=DEVICE)
    return Batch(
        token_ids=torch.randint(5, 1000, (case.tokens,), device=DEVICE),
        positions=torch.arange(case.before, case.before + case.new, device=DEVICE).repeat(case.count),
        sequence_of=torch.arange(case.count, device=DEVICE).repeat_interleave(case.new),
        block_tables=tables.to(torch.int32),
        lengths=torch.full((case.count,), case.before + case.new, dtype=torch.int32, device=DEVICE),
        query_starts=starts,
        num_decodes=0,
        max_query=case.new,
        sample_rows=starts[1:].long() - 1,
    )


def product_times(decoder: Decoder, tokens: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Of each product of a layer, several layers' weights in turn: seconds, and operations."""
    layers = decoder.weights.layers[:8]
    found: dict[str, tuple[float, float]] = {}
    for name in ("qkv", "output", "gate_up", "down"):
        matrices = []
        for layer in layers:
            assert isinstance(layer.mlp, Mlp)
            owner = layer if name in ("qkv", "output") else layer.mlp
            matrices.append(getattr(owner, name))
        size_out, size_in = matrices[0].weight.shape
        x = torch.randn(tokens, size_in, dtype=torch.bfloat16, device=DEVICE)

        def all_layers(x: Tensor = x, matrices: list[Matrix] = matrices) -> None:
            for matrix in matrices:
                matrix(x)

        seconds = statistics.median(times(all_layers, rounds)) / len(layers)
        found[name] = seconds, 2.0 * tokens * size_out * size_in
    return found


def attention_of(decoder: Decoder, batch: Batch, cache: KVCache) -> Callable[[], None]:
    """The attention of every layer, without storing keys and values."""
    shape = (len(batch.token_ids), decoder.shard.num_heads, decoder.spec.head_dim)
    queries = torch.randn(shape, dtype=cache.keys[0].dtype, device=DEVICE)
    attention = decoder.attention
    plan = attention.prepare(batch, cache.block_size)

    def all_layers() -> None:
        for keys, values in zip(cache.keys, cache.values, strict=True):
            attention(queries, keys, values, plan)

    return all_layers


def times(work: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of each round, behind two that warm up."""
    found = []
    for _ in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1000)
    return found[2:]


def by_kernel(work: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """How often each kernel runs in it, and µs, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        work()
        torch.cuda.synchronize()
    entries = sorted(trace.key_averages(), key=lambda entry: -entry.self_device_time_total)
    return {e.key: (e.count, e.self_device_time_total) for e in entries if e.self_device_time_total}


def print_tables(name: str, rows: list[dict[str, Any]], console: Console) -> None:
    """All cases of one model."""
    table = Table(title=f"{name}: a step of prompts")
    columns = ("case", "ms, median (spread)", "tokens/s", "TFLOP/s", "of the peak")
    parts = tuple(rows[0]["products"])
    for column in (*columns, *(f"{part}, µs (TFLOP/s)" for part in parts), "attention, µs (TFLOP/s)"):
        table.add_column(column, justify="right")
    for row in rows:
        ms = row["ms"]
        table.add_row(
            row["case"],
            f"{statistics.median(ms):.2f} ({min(ms):.2f} … {max(ms):.2f})",
            f"{row['tokens_per_second']:.0f}",
            f"{row['tflops']:.0f}",
            f"{row['share']:.0%}",
            *(f"{us:.0f} ({tflops:.0f})" for us, tflops in row["products"].values()),
            "{:.0f} ({:.0f})".format(*row["attention"]),
        )
    console.print(table)
