"""How long one decode step of the model takes on CPU ranks: forward, all-reduces, logits, sampling.

    python -m benchmarks.steps.model_step --tp 2 --dtype bfloat16 --batch 1 4 16 64 --context 300
    python -m benchmarks.steps.model_step --transformers --dtype bfloat16        # the yardstick, batch 1

No scheduler and no streams: what a rank's compute stream does in a decode step, and nothing else. Each rank
is a process with the machine's cores divided among the ranks. CPU ms is rank 0's own time, without waiting.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tpworker.checkpoint.weights import load_weights
from tpworker.ipc.barrier import Barrier
from tpworker.ipc.limits import usable_cores
from tpworker.model.decoder import Batch, Decoder, KVCache
from tpworker.model.families import read_spec
from tpworker.model.sampling import SamplingMode, SamplingRows, sample
from tpworker.model.tp import Shard
from tpworker.rank.collectives import connect

DEFAULT_MODEL = Path.home() / ".cache/tpworker/models/SmolLM2-135M-Instruct"
BLOCK_SIZE = 16
CPU = torch.device("cpu")
MODES = {
    "greedy": (SamplingMode(False, False, False), 0.0, 1.0),
    "random": (SamplingMode(True, False, False), 1.0, 1.0),
    "top_p": (SamplingMode(True, True, False), 1.0, 0.9),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--context", type=int, default=300)
    parser.add_argument("--sampling", choices=tuple(MODES), default="greedy")
    parser.add_argument(
        "--threads", type=int, help="of each rank; default: the cores divided among the ranks"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--profile", action="store_true", help="print rank 0's operators at the last batch size"
    )
    parser.add_argument("--transformers", action="store_true", help="measure transformers instead")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--fds", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.transformers:
        measure_transformers(arguments)
    elif arguments.rank is not None:
        with torch.inference_mode():
            run_rank(arguments)
    else:
        sys.exit(start_ranks(arguments.tp))


def start_ranks(size: int) -> int:
    """One process a rank, with shared memory for their collectives; returns the worst exit status."""
    fds = [Barrier.create(size).fd, os.memfd_create("exchange")]
    command = [sys.executable, "-m", "benchmarks.steps.model_step", *sys.argv[1:], "--fds", *map(str, fds)]
    ranks = [subprocess.Popen([*command, "--rank", str(rank)], pass_fds=fds) for rank in range(size)]
    return max(rank.wait() for rank in ranks)


def run_rank(arguments: argparse.Namespace) -> None:
    size, rank = arguments.tp, arguments.rank
    torch.set_num_threads(arguments.threads or max(1, usable_cores() // size))
    collectives = connect(*arguments.fds, rank, size, lambda: 60.0)
    spec = read_spec(arguments.model)
    shard = Shard.of(spec, rank, size)
    weights = load_weights(arguments.model, spec, shard, getattr(torch, arguments.dtype), CPU)
    decoder = Decoder(spec, weights, shard, collectives, spec.max_model_len)
    if rank == 0:
        what = f"{arguments.dtype}, context {arguments.context}, {arguments.sampling}"
        print(f"{arguments.model.name}, TP {size}, {torch.get_num_threads()} threads a rank, {what}")
        print("batch  ms a step (median)   best  CPU ms (rank 0)  tokens/s")
    for batch_size in arguments.batch:
        step = make_step(decoder, batch_size, arguments)
        for _ in range(3):
            step()
        times = []
        cpu = time.process_time()
        for _ in range(arguments.steps):
            start = time.perf_counter()
            step()
            times.append(1000 * (time.perf_counter() - start))
        cpu = 1000 * (time.process_time() - cpu) / arguments.steps
        median = statistics.median(times)
        if rank == 0:
            rate = 1000 * batch_size / median
            print(f"{batch_size:5} {median:19.1f} {min(times):6.1f} {cpu:16.1f} {rate:9.0f}", flush=True)
    if arguments.profile:
        with torch.profiler.profile() as profile:
            for _ in range(5):
                step()
        if rank == 0:
            for entry in sorted(profile.key_averages(), key=lambda entry: -entry.self_cpu_time_total)[:25]:
                print(
                    f"{entry.self_cpu_time_total / 5000:8.2f} ms a step {entry.count / 5:7.0f} x {entry.key}"
                )


def make_step(decoder: Decoder, batch_size: int, arguments: argparse.Namespace) -> Callable[[], Tensor]:
    """A decode step with a cache of its own, always at the same length."""
    mode, temperature, top_p = MODES[arguments.sampling]
    width = -(-(arguments.context + 1) // BLOCK_SIZE)
    dtype = getattr(torch, arguments.dtype)
    cache = KVCache(decoder.spec, decoder.shard, batch_size * width + 1, BLOCK_SIZE, dtype, CPU)
    for layer in (*cache.keys, *cache.values):
        layer.normal_()
    batch = decode_batch(batch_size, arguments.context, width)
    rows = sampling_rows(batch_size, temperature, top_p)

    def step() -> Tensor:
        logits = decoder.logits(decoder.forward(batch, cache))
        return sample(decoder.operations, logits, rows, mode, decoder.vocab_start, decoder.collectives)

    return step


def decode_batch(batch_size: int, context: int, width: int) -> Batch:
    """Every sequence at the same length, its blocks scattered over the cache."""
    tables = (torch.randperm(batch_size * width) + 1).view(batch_size, width).to(torch.int32)
    return Batch(
        token_ids=torch.randint(5, 1000, (batch_size,)),
        positions=torch.full((batch_size,), context),
        sequence_of=torch.arange(batch_size),
        block_tables=tables,
        lengths=torch.full((batch_size,), context + 1, dtype=torch.int32),
        query_starts=torch.arange(batch_size + 1, dtype=torch.int32),
        num_decodes=batch_size,
        max_query=1,
    )


def sampling_rows(batch_size: int, temperature: float, top_p: float) -> SamplingRows:
    return SamplingRows(
        temperature=torch.full((batch_size,), temperature),
        top_p=torch.full((batch_size,), top_p),
        top_k=torch.zeros(batch_size, dtype=torch.int64),
        seed=torch.arange(batch_size),
        position=torch.full((batch_size,), 301),
        min_length=torch.zeros(batch_size, dtype=torch.int64),
        stop_ids=torch.full((batch_size, 16), -1),
    )


def measure_transformers(arguments: argparse.Namespace) -> None:
    """Batch 1, greedy, a prompt of `context` tokens; the time of the prompt is not counted."""
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
    for batch_size in arguments.batch:
        prompt = torch.randint(5, 1000, (batch_size, arguments.context))
        with torch.inference_mode():
            output = model(prompt, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            token = output.logits[:, -1:].argmax(-1)
            times = []
            for _ in range(arguments.steps + 3):
                start = time.perf_counter()
                token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
                times.append(1000 * (time.perf_counter() - start))
        median = statistics.median(times[3:])
        print(
            f"transformers, {torch.get_num_threads()} threads, {arguments.dtype}, batch {batch_size}: "
            f"{median:.1f} ms a step, {1000 * batch_size / median:.0f} tokens/s",
            flush=True,
        )


if __name__ == "__main__":
    main()
