"""One rank of the benchmark of collectives, on one GPU."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import chain, cycle, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor, distributed

from benchmarks.collectives.barrier_rank import phase
from benchmarks.collectives.collectives import Job
from tpworker.ipc.barrier import Barrier
from tpworker.kernels import cuda_operations, pdl, symmetric_kernels, triton_kernels
from tpworker.model import composed_ops
from tpworker.model.families import read_spec
from tpworker.model.tp import Shard, argmax_ranks, embed
from tpworker.rank.cuda_collectives import NcclCollectives, SymmetricCollectives

TIMEOUT = 60.0
EPS = 1e-6
CALLS = 16  # of a collective in one graph
SETTLE = 3  # replays at the beginning of a round that are not looked at
STEP_LAYERS = 24  # matrix products and sums in a step of `skew`, about 0.5 ms
SAMPLED_ROWS = (1, 16, 64, 256)
LAYER_ROWS = (1, 16, 64)
MODEL = Path(__file__).parents[1] / "configs" / "qwen3-8b"
PRODUCT = 4096  # rows of the weight, and times the number of ranks its columns

_distributed: Any = distributed
_memory: Any = symmetric_memory
_ops: Any = torch.ops


class Bench:
    """The group, as one rank sees it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.device = torch.device("cuda", job.rank)
        torch.cuda.set_device(self.device)
        self.ranks = SymmetricCollectives(job.store_fd, job.rank, job.size, TIMEOUT, self.device)
        self.barrier = Barrier.attach(job.barrier_fd, job.size)
        self.step = -1
        self.stream = torch.cuda.Stream()
        self.group = _distributed.group.WORLD.group_name
        most = max(job.rows) * max(job.columns)
        self.shared: Tensor = _memory.empty(most, dtype=torch.bfloat16, device=self.device)
        _memory.rendezvous(self.shared, self.group)

    def meet(self) -> None:
        """At the admission barrier."""
        self.step += 1
        self.barrier.wait(self.job.rank, self.step, 0x5EED5EED, TIMEOUT)

    def graph(self, work: Callable[[], Any], calls: int) -> torch.cuda.CUDAGraph:
        """`work`, so many times, after one time outside."""
        graph = torch.cuda.CUDAGraph()
        work()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            for _ in range(calls):
                work()
        return graph

    def times(self, what: str, works: dict[str, Callable[[], Any]]) -> dict[str, list[list[float]]]:
        """µs of one call, by name, round and replay: the works in turns. Rank 0 says what it found."""
        graphs = {name: self.graph(work, CALLS) for name, work in works.items()}
        found: dict[str, list[list[float]]] = {name: [] for name in works}
        for _ in range(self.job.rounds):
            for name, graph in graphs.items():
                events = [torch.cuda.Event(enable_timing=True) for _ in range(self.job.replays + SETTLE + 1)]
                torch.cuda.synchronize()
                self.meet()
                with torch.cuda.stream(self.stream):
                    events[0].record()
                    for event in events[1:]:
                        graph.replay()
                        event.record()
                events[-1].synchronize()
                spans = [a.elapsed_time(b) for a, b in pairwise(events)]
                found[name].append([1000 * span / CALLS for span in spans[SETTLE:]])
        if self.job.rank == 0:
            medians = [f"{name} {median(chain(*found[name])):.1f}" for name in found]
            print(what, *medians, sep=", ", file=sys.stderr, flush=True)
        return found

    # ------------------------------------------------------------------------------------- on the GPU

    def sums(self, rows: int, columns: int) -> dict[str, Callable[[], Any]]:
        """Ways to add up parts, add them to the residual stream and norm it; and to add up alone."""
        draw = partial(torch.randn, rows, columns, device=self.device, dtype=torch.bfloat16)
        x, part, swelling = draw(), draw(), draw()
        weight = torch.ones(columns, dtype=torch.bfloat16, device=self.device)
        inboxes = self.ranks.inboxes
        flat = part.view(-1)
        shared = self.shared[: flat.numel()]
        group = self.group
        works: dict[str, Callable[[], Any]] = {}

        def norm(total: Tensor) -> Tensor:
            return triton_kernels.add_norm(x, total.view(x.shape), weight, EPS)

        if inboxes.takes(part):
            for name, two_shot in (("one shot", False), ("two shots", True)):
                works[f"fused, {name}"] = partial(
                    symmetric_kernels.reduce_add_norm, x, part, weight, EPS, inboxes, two_shot
                )
        if part.nbytes <= 4 << 20:
            works["symm_mem one shot + norm"] = lambda: norm(
                _ops.symm_mem.one_shot_all_reduce_copy(shared, flat, "sum", group)
            )
        works["symm_mem two shots + norm"] = lambda: norm(
            _ops.symm_mem.two_shot_all_reduce_(shared, "sum", group)
        )
        works["NCCL + norm"] = lambda: norm(NcclCollectives.all_reduce(self.ranks, swelling))
        if inboxes.takes(part):
            works["fused, no early start"] = _plainly(works["fused, one shot"])
            works["sum alone, one shot"] = partial(symmetric_kernels.all_reduce, part, inboxes, False)
        works["norm alone"] = lambda: norm(part)
        return works

    def layers(self, rows: int) -> dict[str, Callable[[], Any]]:
        """A product that makes the part, and the sum: how much of it is seen beside the weights."""
        square = partial(torch.randn, PRODUCT, PRODUCT // self.ranks.size, device=self.device)
        linears = [cuda_operations.linear(square(dtype=torch.bfloat16) / 64) for _ in range(CALLS)]
        x = torch.randn(rows, PRODUCT, device=self.device, dtype=torch.bfloat16)
        own = x[:, : PRODUCT // self.ranks.size].contiguous()
        weight = torch.ones(PRODUCT, dtype=torch.bfloat16, device=self.device)
        turn = cycle(linears)
        ranks = {"fused": self.ranks, "NCCL + norm": _Plain(self.ranks)}

        def layer(how: str) -> None:
            composed_ops.reduce_add_norm(cuda_operations, x, next(turn)(own), weight, EPS, ranks[how])

        works: dict[str, Callable[[], Any]] = {how: partial(layer, how) for how in ranks}
        works["fused, no early start"] = _plainly(works["fused"])
        works["product alone"] = lambda: next(turn)(own)
        return works

    def lookups(self, rows: int) -> dict[str, Callable[[], Any]]:
        """Ways to get rows of an embedding that is split over the ranks."""
        spec = read_spec(MODEL)
        shard = Shard.of(spec, self.ranks.rank, self.ranks.size)
        table = torch.randn(shard.vocab.local, spec.hidden_size, device=self.device, dtype=torch.bfloat16)
        ids = torch.randint(0, spec.vocab_size, (rows,), device=self.device)
        ranks = {"one kernel": self.ranks, "torch + NCCL": _Plain(self.ranks)}
        return {how: partial(embed, ids, table, shard, ranks[how]) for how in ranks}

    def choices(self, rows: int) -> dict[str, Callable[[], Any]]:
        """Ways to find the best token of all ranks."""
        best = torch.randn(rows, device=self.device)
        token = torch.randint(0, 1000, (rows,), device=self.device) + 1000 * self.job.rank
        plain = _Plain(self.ranks)
        return {
            "one kernel": partial(symmetric_kernels.argmax, best, token, self.ranks.inboxes),
            "NCCL + torch": partial(argmax_ranks, best, token, plain),
        }

    # ------------------------------------------------------------------------------------ on the host

    def barriers(self) -> dict[str, Any]:
        """Times of coming and leaving; see `benchmarks.collectives.barrier`."""

        def nccl() -> None:
            _distributed.barrier()
            torch.cuda.synchronize()

        notes: dict[str, Any] = {}
        for name, meet in (("ours", self.meet), ("NCCL", nccl)):
            notes[name] = {"back": [], "late": []}
            for _ in range(self.job.rounds):
                notes[name]["back"].append(phase(meet, self.job.steps, lambda step: False))
                notes[name]["late"].append(
                    phase(meet, 10, lambda step: step % self.job.size == self.job.rank)
                )
        return notes

    def skew(self) -> dict[str, list[int]]:
        """ns at which each step comes to the barrier. A step is a graph; two may be unfinished.

        The old way beside it: a step, NCCL's barrier, and waiting for the device.
        """
        x, part = (torch.randn(16, 4096, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        weight = torch.ones(4096, dtype=torch.bfloat16, device=self.device)
        square = torch.randn(4096, 4096, device=self.device, dtype=torch.bfloat16) / 64

        def layer() -> None:
            normed = symmetric_kernels.reduce_add_norm(x, part, weight, EPS, self.ranks.inboxes, False)
            torch.mm(normed, square, out=part)

        graph = self.graph(layer, STEP_LAYERS)
        came: dict[str, list[int]] = {"ours": [], "NCCL": []}
        events = [torch.cuda.Event() for _ in range(3)]
        with torch.cuda.stream(self.stream):
            for event in events:
                event.record()
            for step in range(self.job.steps):
                while not events[step % 3].query():
                    time.sleep(20e-6)
                came["ours"].append(time.monotonic_ns())
                self.meet()
                graph.replay()
                events[step % 3].record()
            torch.cuda.synchronize()
            for _ in range(self.job.steps):
                came["NCCL"].append(time.monotonic_ns())
                _distributed.barrier()
                torch.cuda.synchronize()
                graph.replay()
            torch.cuda.synchronize()
        return came


class _Plain(NcclCollectives):
    """The same group, without what fuses."""

    def __init__(self, ranks: NcclCollectives) -> None:
        self.rank, self.size = ranks.rank, ranks.size


def _plainly(work: Callable[[], Any]) -> Callable[[], Any]:
    """The same kernels, each launched when the one ahead of it has ended."""

    def plain() -> None:
        before, pdl.ENABLED = pdl.ENABLED, False
        try:
            work()
        finally:
            pdl.ENABLED = before

    return plain


def main() -> None:
    """Measures as told, prints one JSON object."""
    job = Job(**json.loads(sys.argv[1]))
    gc.freeze()  # a capture collects garbage
    gc.disable()
    sums, layers, lookups, choices = {}, {}, {}, {}
    with torch.inference_mode():
        bench = Bench(job)
        for columns in job.columns:
            for rows in job.rows:
                shape = f"{rows} x {columns}"
                sums[shape] = bench.times(shape, bench.sums(rows, columns))
        for rows in LAYER_ROWS:
            layers[str(rows)] = bench.times(f"layer, {rows}", bench.layers(rows))
        for rows in SAMPLED_ROWS:
            lookups[str(rows)] = bench.times(f"lookup, {rows}", bench.lookups(rows))
            choices[str(rows)] = bench.times(f"choice, {rows}", bench.choices(rows))
        answer = {"sums": sums, "layers": layers, "lookups": lookups, "choices": choices}
        answer |= {"barriers": bench.barriers(), "came": bench.skew()}
    bench.meet()
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
