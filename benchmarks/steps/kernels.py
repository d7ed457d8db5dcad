"""What a decode step costs one GPU, kernel by kernel: forward and sampling of a model, one captured graph.

Dummy weights in bfloat16, TP 1, every sequence at the same length, greedy. No scheduler, no ring and no
publisher: the yardstick for what the runtime adds. The tables:

  steps      time of a graph replay for each attention backend, beside the peer's decode TPOT (vLLM 0.26 on an
             H200, docs/benchmarks.md), the goal, and the time that the bytes of weights and KV cache need at
             4.3 TB/s; how many kernels a step is, and how long they ran, from a profiler trace
  attention  µs a layer with norms, rotation and storage of its heads, every layer's cache in turn
  products   µs of each matrix product and of the norm before it, every layer's weight in turn
  sampling   µs from logits to tokens, plain and with what requests can ask for: min-p, top-k and top-p
             (truncated), rules of every kind, logprobs; and all of it at once, in every row
  drafts     µs of what steps with W - 1 drafts read from the slot table and write to it, of look-up in
             histories of 8,000 tokens, and of a layer's attention, by each backend, of W tokens a sequence
  kernels    of the fastest backend, the profiler's time by kernel
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common.floors import BYTES_PER_SECOND, floor_bytes
from benchmarks.common.options import positive
from benchmarks.common.quantized import add_quantization, quantized
from benchmarks.common.report import machine, save
from tpworker.checkpoint.weights import dummy_weights
from tpworker.ipc.messages import MAX_BARRED, MAX_BARRED_LENGTH, MAX_BIAS
from tpworker.kernels.operands import BIASED, MASKED, PENALISED, WORDS_BARRED, LogitTables, SlotState
from tpworker.model import composed_ops
from tpworker.model.attention import Attention, flash
from tpworker.model.batch import Batch
from tpworker.model.decoder import Decoder
from tpworker.model.families import ModelSpec, read_spec
from tpworker.model.kv_cache import KVCache
from tpworker.model.logprobs import logprob_rows
from tpworker.model.mlp import Mlp
from tpworker.model.rope import rope_tables
from tpworker.model.sampling import SamplingMode, SamplingRows, sample
from tpworker.model.tp import Shard
from tpworker.rank.collectives import SoleRank

CONFIGS = Path(__file__).parents[1] / "configs"
# (peer ms, goal ms) of (model, batch); None: no goal was set.
YARDSTICKS: dict[tuple[str, int], tuple[float, float | None]] = {
    ("qwen3-0.6b", 1): (1.75, 0.8),
    ("qwen3-0.6b", 16): (1.94, 1.0),
    ("qwen3-0.6b", 64): (3.23, 2.1),
    ("qwen3-0.6b", 256): (7.35, 6.0),
    ("qwen3-8b", 1): (5.22, 4.4),
    ("qwen3-8b", 16): (5.62, 4.8),
    ("qwen3-8b", 64): (7.08, 6.1),
}
GREEDY = SamplingMode(random=False, truncate=False, suppress=False)
RANDOM = SamplingMode(random=True, truncate=False, suppress=False)
TRUNCATED = SamplingMode(random=True, truncate=True, suppress=False)
WIDTHS = (1, 2, 4, 5)  # new tokens of a sequence: with no draft, one, three, four
HISTORY = 8000  # tokens


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=["qwen3-0.6b", "qwen3-8b"], help="folders of configs/")
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--context", type=positive, default=650, help="tokens of each sequence")
    parser.add_argument("--block-size", type=positive, default=16)
    add_quantization(parser)
    parser.add_argument("--rounds", type=positive, default=5, help="of 20 replays each; the median is told")


def run(options: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("a GPU is needed, and there is none here", file=sys.stderr)
        return 1
    data: dict[str, Any] = {"machine": machine() | {"gpu": torch.cuda.get_device_name()}, "rows": []}
    console = Console(width=150)
    with torch.inference_mode():
        for name in options.models:
            data["rows"] += measure_model(name, options, console)
    save(options.json, data)
    return 0


def measure_model(name: str, options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Every batch size of one model; prints its tables."""
    device = torch.device("cuda")
    spec = quantized(read_spec(CONFIGS / name), options.quantization)
    shard = Shard.of(spec, 0, 1)
    weights = dummy_weights(spec, shard, torch.bfloat16, device)
    decoder = Decoder(spec, weights, shard, SoleRank(), options.context + 64)
    chosen = decoder.attention
    rows = []
    for count in options.batch:
        width = -(-options.context // options.block_size)
        cache = KVCache(spec, shard, count * width + 1, options.block_size, torch.bfloat16, device)
        for layer in (*cache.keys, *cache.values):
            layer.normal_()
        batch = decode_batch(count, options.context, width)
        row: dict[str, Any] = {"model": name, "batch": count, "context": options.context}
        print(f"{name}, batch {count}", flush=True)
        row["floor_ms"] = 1000 * floor_bytes(spec, shard, count * options.context, count) / BYTES_PER_SECOND
        row["attention_us"], row["step_ms"] = {}, {}
        for backend, attention in backends(spec, shard, chosen).items():
            decoder.attention = attention
            row["attention_us"][backend] = attention_us(decoder, batch, cache, options.rounds)
            row["step_ms"][backend] = replay_ms(step_of(decoder, batch, cache, GREEDY), options.rounds)[0]
        decoder.attention = chosen
        for what, change in (("library's products", library_products), ("no early starts", plain_launches)):
            with change():
                step = step_of(decoder, batch, cache, GREEDY)
                row["step_ms"][what] = replay_ms(step, options.rounds)[0]
        row["products_us"] = products_us(decoder, count, options.rounds)
        row["sampling_us"] = sampling_us(decoder, count, options.rounds)
        row["drafts_us"] = slots_us(decoder, count, width, options.rounds)
        found = backends(spec, shard, chosen)
        found.pop("flash", None)  # without a shared schedule it is the slower one
        for (backend, attention), new in itertools.product(found.items(), WIDTHS):
            decoder.attention = attention
            wide = decode_batch(count, options.context, width, new)
            row["drafts_us"][f"{backend}, {new}"] = attention_us(decoder, wide, cache, options.rounds)
        decoder.attention = chosen
        row["random_ms"] = replay_ms(step_of(decoder, batch, cache, RANDOM), options.rounds)[0]
        _, graph = replay_ms(step_of(decoder, batch, cache, GREEDY), 1)
        row["kernels"] = profile(graph)
        rows.append(row)
        del cache, graph
        torch.cuda.empty_cache()
    print_tables(rows, console)
    return rows


def backends(spec: ModelSpec, shard: Shard, chosen: Attention) -> dict[str, Attention]:
    """What can be compared here: the choice of `choose`, and each way to do it alone."""
    sizes = (shard.num_heads, shard.num_kv_heads, spec.head_dim)
    found: dict[str, Attention] = {"chosen": chosen}
    if flash.why_not(spec.head_dim, torch.bfloat16, torch.device("cuda")) is None:
        found["flash"] = flash.FlashAttention(*sizes, torch.bfloat16, share_schedule=False)
        found["flash, shared schedule"] = flash.FlashAttention(*sizes, torch.bfloat16)
    return found


def decode_batch(count: int, context: int, width: int, new: int = 1) -> Batch:
    """The last `new` tokens of sequences of one length, whose blocks are scattered over the cache."""
    tables = (torch.randperm(count * width, device="cuda") + 1).view(count, width).to(torch.int32)
    return Batch(
        token_ids=torch.randint(5, 1000, (count * new,), device="cuda"),
        positions=torch.arange(context - new, context, device="cuda").repeat(count),
        sequence_of=torch.arange(count, device="cuda").repeat_interleave(new),
        block_tables=tables,
        lengths=torch.full((count,), context, dtype=torch.int32, device="cuda"),
        query_starts=new * torch.arange(count + 1, dtype=torch.int32, device="cuda"),
        num_decodes=count,
        max_query=new,
        width=new,
    )


def step_of(decoder: Decoder, batch: Batch, cache: KVCache, mode: SamplingMode) -> Callable[[], Tensor]:
    """Forward and sampling of a decode step."""
    rows = sampling_rows(batch.positions + 1)

    def step() -> Tensor:
        logits = decoder.logits(decoder.forward(batch, cache))
        return sample(decoder.operations, logits, rows, mode, decoder.vocab_start, decoder.collectives)

    return step


def sampling_rows(positions: Tensor) -> SamplingRows:
    """For the tokens at these positions (int64 [R]): all that truncates is on, if the mode says so."""
    count = len(positions)
    return SamplingRows(
        temperature=torch.full((count,), 0.7, device="cuda"),
        top_p=torch.full((count,), 0.95, device="cuda"),
        top_k=torch.full((count,), 40, device="cuda"),
        seed=torch.arange(count, device="cuda"),
        position=positions,
        min_length=torch.zeros_like(positions),
        stop_ids=torch.full((count, 16), -1, device="cuda"),
        log_min_p=torch.full((count,), 0.02, device="cuda").log(),
    )


def logit_tables(count: int, vocab_size: int) -> LogitTables:
    """As a rank has them, every kind of rule in every slot; a few hundred tokens were met before."""
    rows = count + 1

    def integers(high: int, *size: int) -> Tensor:
        return torch.randint(high, (rows, *size), dtype=torch.int32, device="cuda")

    return LogitTables(
        vocab_start=0,
        uses=torch.full(
            (rows,), PENALISED | MASKED | BIASED | WORDS_BARRED, dtype=torch.int32, device="cuda"
        ),
        penalties=torch.tensor([1.1, 0.2, 0.1], device="cuda").repeat(rows, 1),
        counts=(integers(300, vocab_size) == 0).int(),
        allowed=integers(1 << 30, -(-vocab_size // 32)),
        bias_ids=torch.randperm(vocab_size, device="cuda")[:MAX_BIAS].int().repeat(rows, 1),
        bias=torch.randn(rows, MAX_BIAS, device="cuda"),
        barred=integers(vocab_size, MAX_BARRED, MAX_BARRED_LENGTH),
        history=integers(vocab_size, 2 * MAX_BARRED_LENGTH),
    )


def sampling_us(decoder: Decoder, count: int, rounds: int) -> dict[str, float]:
    """Microseconds from logits to tokens, and of its parts."""
    operations, sole, vocab_size = (
        decoder.operations,
        decoder.collectives,
        decoder.weights.lm_head.weight.shape[0],
    )
    slots, positions = torch.arange(count, device="cuda"), torch.full((count,), 700, device="cuda")
    rows, tables = sampling_rows(positions), logit_tables(count, vocab_size)
    logits = (3 * torch.randn(count, vocab_size, device="cuda")).bfloat16()
    tokens = logits.argmax(dim=-1)
    none = torch.empty(count, 0, dtype=torch.int64, device="cuda")
    adjust = partial(operations.adjust, logits, slots, positions, tables, none)

    def chosen(mode: SamplingMode, logits: Tensor = logits) -> Tensor:
        return sample(operations, logits, rows, mode, 0, sole)

    def counted(tokens: Tensor = tokens) -> Tensor:
        operations.count_tokens(slots, tokens, positions, tables)
        return tokens

    def told(tokens: Tensor = tokens) -> Tensor:
        return logprob_rows(operations, logits, tokens, 0, sole)

    works: dict[str, Callable[[], Tensor]] = {
        "greedy": partial(chosen, GREEDY),
        "random": partial(chosen, RANDOM),
        "truncated": partial(chosen, TRUNCATED),
        "adjust": adjust,
        "count": counted,
        "logprob parts": partial(operations.logprob_parts, logits, tokens, 0),
        "logprobs": told,
        "all": lambda: told(counted(chosen(TRUNCATED, adjust()))),
    }
    return {what: 1000 * replay_ms(work, rounds)[0] for what, work in works.items()}


def slots_us(decoder: Decoder, count: int, num_blocks: int, rounds: int) -> dict[str, float]:
    """Microseconds of what a step reads from the slot table and writes to it, and of looking drafts up."""
    operations, num_drafts = decoder.operations, max(WIDTHS) - 1
    slots = torch.arange(count, device="cuda")

    def column(value: int, *size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.full((count + 1, *size), value, dtype=dtype, device="cuda")

    state = SlotState(
        last_token=column(5),
        position=column(HISTORY // 2),
        end=column(1 << 40, 8)[:, 4],
        most_drafts=column(num_drafts, 8)[:, 5],
        drafts=column(-1, num_drafts),
        history=torch.randint(1000, (count + 1, 2 * HISTORY), dtype=torch.int32, device="cuda"),
        block_table=column(1, num_blocks, dtype=torch.int32),
    )
    counter = torch.zeros(1, dtype=torch.int64, device="cuda")
    ring = torch.zeros(4, 1 + count * (max(WIDTHS) + 1), dtype=torch.int64, device="cuda")

    def begun(width: int) -> Tensor:
        return operations.begin_decode(slots, width, state)[0]

    def looked_up() -> Tensor:
        operations.look_up(slots, num_drafts, 4, 2, state)
        return state.drafts

    works: dict[str, Callable[[], Tensor]] = {}
    for width in WIDTHS:
        tokens = torch.full((count * width,), 7, device="cuda")
        works[f"begin, {width}"] = partial(begun, width)
        works[f"finish, {width}"] = partial(
            operations.finish_step, slots, tokens, width, state, counter, ring
        )
    found = {}
    for what, work in works.items():
        found[what] = 1000 * replay_ms(work, rounds)[0]
    state.position.fill_(HISTORY - 1)
    found["look-up"] = 1000 * replay_ms(looked_up, rounds)[0]
    return found


def attention_us(decoder: Decoder, batch: Batch, cache: KVCache, rounds: int) -> float:
    """Microseconds of one layer's attention, with norms, rotation and storage of its heads, and its share of
    what is prepared once a step."""
    attention, spec, shard = decoder.attention, decoder.spec, decoder.shard
    num_heads = shard.num_heads + 2 * shard.num_kv_heads
    heads = torch.randn(len(batch.token_ids), num_heads, spec.head_dim, device="cuda").bfloat16()
    norm = torch.ones(spec.head_dim, device="cuda").bfloat16()
    norms = (norm, norm) if spec.qk_norm else None
    operations = decoder.operations
    attend = partial(composed_ops.store_and_attend, operations)
    angles = rope_tables(spec.rope, spec.head_dim, int(batch.positions.max()) + 1, heads.device)

    def layers() -> Tensor:
        places = operations.places(
            batch.positions, batch.sequence_of, batch.block_tables, *angles, cache.block_size
        )
        plan = attention.prepare(batch, cache.block_size)
        for layer in range(spec.num_layers):
            kv = (cache.keys[layer], cache.values[layer])
            out = attend(attention, plan, heads, norms, spec.rms_norm_eps, places, *kv)
        return out

    return 1000 * replay_ms(layers, rounds)[0] / spec.num_layers


def products_us(decoder: Decoder, count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds of each of a layer's products and of the output head, with a norm before it and, for
    gate_up, the gate behind it: by the library alone, and as chosen."""
    layers = decoder.weights.layers
    kinds = {kind: [getattr(layer, kind) for layer in layers] for kind in ("qkv", "output")}
    dense = [layer.mlp for layer in layers if isinstance(layer.mlp, Mlp)]
    if dense:
        kinds |= {kind: [getattr(mlp, kind) for mlp in dense] for kind in ("gate_up", "down")}
    kinds["lm_head"] = [decoder.weights.lm_head]
    found: dict[str, dict[str, float]] = {}
    for kind, weights in kinds.items():
        x = torch.randn(count, weights[0].weight.shape[1], device="cuda").bfloat16()
        size_in = x.shape[1]
        norm = torch.ones(size_in, device="cuda").bfloat16()

        def products(
            x: Tensor = x, norm: Tensor = norm, weights: Any = weights, is_gated: bool = kind == "gate_up"
        ) -> Tensor:
            for weight in weights:
                normed = decoder.operations.add_norm(x, None, norm, 1e-6)
                out: Tensor = weight.gated(normed) if is_gated else weight(normed)
            return out

        found[kind] = {}
        for what, change in (("library", library_products), ("chosen", contextlib.nullcontext)):
            with change():
                found[kind][what] = 1000 * replay_ms(products, rounds)[0] / len(weights)
        found[kind]["floor"] = 1e6 * weights[0].weight.nbytes / BYTES_PER_SECOND
    return found


@contextlib.contextmanager
def library_products() -> Iterator[None]:
    """No product by a kernel of our own."""
    from tpworker.kernels import skinny_kernel

    rule, skinny_kernel.choose = skinny_kernel.choose, lambda num_rows, weight, gated: None
    yield
    skinny_kernel.choose = rule


@contextlib.contextmanager
def plain_launches() -> Iterator[None]:
    """No kernel starts before the one before it has ended."""
    from tpworker.kernels import pdl

    pdl.ENABLED = False
    yield
    pdl.ENABLED = True


def replay_ms(work: Callable[[], Tensor], rounds: int) -> tuple[float, torch.cuda.CUDAGraph]:
    """Median time of a replay of `work`, captured, when replays are queued back to back; and the graph."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()  # what `work` reads is there
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    times = []
    for _ in range(rounds + 1):  # the first warms up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(20):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 20)
    return statistics.median(times[1:]), graph


def profile(graph: torch.cuda.CUDAGraph) -> dict[str, tuple[float, float]]:
    """Of one replay, for each kernel: how often it ran, and its time in µs."""
    replays = 5
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
    return {
        entry.key: (entry.count / replays, entry.self_device_time_total / replays)
        for entry in sorted(trace.key_averages(), key=lambda entry: -entry.self_device_time_total)
        if entry.self_device_time_total
    }


def print_tables(rows: list[dict[str, Any]], console: Console) -> None:
    """One model's rows."""
    name = rows[0]["model"]
    steps = Table(title=f"{name}, context {rows[0]['context']}: ms a step (one graph replay)")
    backend_names = list(rows[0]["step_ms"])
    for column in ("batch", *backend_names, "random", "peer", "goal", "floor", "kernels", "kernels' time"):
        steps.add_column(column, justify="right")
    attention = Table(title=f"{name}: attention, µs a layer")
    for column in ("batch", *rows[0]["attention_us"]):
        attention.add_column(column, justify="right")
    for row in rows:
        peer, goal = YARDSTICKS.get((name, row["batch"]), (None, None))
        kernels = row["kernels"].values()
        figures = [
            *(row["step_ms"].get(backend) for backend in backend_names),
            row["random_ms"],
            peer,
            goal,
            row["floor_ms"],
        ]
        steps.add_row(
            str(row["batch"]),
            *("–" if figure is None else f"{figure:.3f}" for figure in figures),
            f"{sum(count for count, _ in kernels):.0f}",
            f"{sum(time for _, time in kernels) / 1000:.3f}",
        )
        attention.add_row(str(row["batch"]), *(f"{time:.1f}" for time in row["attention_us"].values()))
    console.print(steps)
    console.print(attention)
    products = Table(title=f"{name}: products, µs each with a norm: library / chosen / floor")
    for column in ("batch", *rows[0]["products_us"]):
        products.add_column(column, justify="right")
    for row in rows:
        cells = (" / ".join(f"{time:.1f}" for time in cell.values()) for cell in row["products_us"].values())
        products.add_row(str(row["batch"]), *cells)
    console.print(products)
    sampling = Table(title=f"{name}: sampling, µs")
    for column in ("batch", *rows[0]["sampling_us"]):
        sampling.add_column(column, justify="right")
    for row in rows:
        sampling.add_row(str(row["batch"]), *(f"{time:.1f}" for time in row["sampling_us"].values()))
    console.print(sampling)
    drafts = Table(title=f"{name}: steps with W - 1 drafts, µs (attention: a layer)")
    for column in ("batch", *rows[0]["drafts_us"]):
        drafts.add_column(column, justify="right")
    for row in rows:
        drafts.add_row(str(row["batch"]), *(f"{time:.1f}" for time in row["drafts_us"].values()))
    console.print(drafts)
    for row in rows:
        table = Table(title=f"{name}, batch {row['batch']}: where a step's time goes")
        for column in ("kernel", "times", "µs a step", "µs each"):
            table.add_column(column, justify="left" if column == "kernel" else "right")
        for kernel, (count, time) in list(row["kernels"].items())[:11]:
            table.add_row(kernel[:100], f"{count:.0f}", f"{time:.1f}", f"{time / count:.2f}")
        console.print(table)
