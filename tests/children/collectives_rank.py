"""One CUDA rank of tests/gpu/test_collectives.py: runs the checks that it is told, prints findings as JSON.

Inputs of all ranks are drawn from the same seed, so that every rank knows what the others send.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tpworker.kernels import pdl, symmetric_kernels, triton_kernels
from tpworker.model import composed_ops, layer_ops
from tpworker.model.operations import operations_of
from tpworker.model.tp import argmax_ranks
from tpworker.rank.cuda_collectives import NcclCollectives, SymmetricCollectives

EPS = 1e-6
TIMEOUT = 60.0


def alike(ranks: NcclCollectives, x: Tensor) -> bool:
    """Whether all ranks have the same bits."""
    everybody = NcclCollectives.all_gather(ranks, x.contiguous().view(torch.uint8).view(-1))
    return bool((everybody == everybody[0]).all())


def sums(ranks: SymmetricCollectives) -> dict[str, Any]:
    """Sums of all shapes against float32, and against an all-reduce followed by the norm's own kernel."""
    found: dict[str, Any] = {"cases": 0, "not alike": [], "inexact": [], "error": 0.0, "unlike NCCL": []}
    for columns in (72, 2560, 4096, 5120):
        for rows in (1, 3, 16, 64, 200, ranks.inboxes.row_uses.numel() + 5):
            for two_shot in (False, True):
                parts = torch.randn(ranks.size, rows, columns, device=ranks.device).to(torch.bfloat16)
                parts[:, :, ::7] = -0.0  # what marks an empty entry
                x = torch.randn(rows, columns, device=ranks.device).to(torch.bfloat16)
                weight = torch.randn(columns, device=ranks.device).to(torch.bfloat16)
                part = parts[ranks.rank].contiguous()
                total = torch.zeros(rows, columns, device=ranks.device)
                for summand in parts:
                    total += summand.float()
                total = total.to(torch.bfloat16)
                mine = x.clone()
                normed = symmetric_kernels.reduce_add_norm(mine, part, weight, EPS, ranks.inboxes, two_shot)
                reduced = symmetric_kernels.all_reduce(part, ranks.inboxes, two_shot)
                case = [rows, columns, two_shot]
                found["cases"] += 1
                if not (alike(ranks, mine) and alike(ranks, normed) and alike(ranks, reduced)):
                    found["not alike"].append(case)
                exact = (x.float() + total.float()).to(torch.bfloat16)
                if not (torch.equal(mine, exact) and torch.equal(reduced, total)):
                    found["inexact"].append(case)
                reference = layer_ops.norm(exact.double(), weight.double(), EPS)
                error = float((normed.double() - reference).norm() / reference.norm())
                found["error"] = max(found["error"], error if error == error else 1e9)
                if ranks.size == 2:  # with more ranks the all-reduce rounds more than once
                    other = x.clone()
                    summed = NcclCollectives.all_reduce(ranks, part.clone())
                    also = triton_kernels.add_norm(other, summed, weight, EPS)
                    # Rows that do not fill a program's threads are added up in another order.
                    if not torch.equal(other, mine) or (columns >= 1024 and not torch.equal(also, normed)):
                        found["unlike NCCL"].append(case)
    return found


def nothing(ranks: SymmetricCollectives) -> dict[str, Any]:
    """A step in which no row is sampled."""
    rows = torch.zeros(0, 1024, device=ranks.device, dtype=torch.bfloat16)
    weight = torch.ones(1024, device=ranks.device, dtype=torch.bfloat16)
    summed = ranks.all_reduce(rows)
    normed = composed_ops.reduce_add_norm(operations_of(ranks.device), rows, rows, weight, EPS, ranks)
    ids = torch.zeros(0, device=ranks.device, dtype=torch.int64)
    chosen = argmax_ranks(ids.float(), ids, ranks)
    return {"shapes": [list(result.shape) for result in (summed, normed, chosen)]}


def lookups(ranks: SymmetricCollectives) -> dict[str, Any]:
    """Rows of a table that is split over the ranks, against the whole table."""
    found: dict[str, Any] = {"cases": 0, "wrong": []}
    for vocab, columns in ((40, 72), (1000, 1024), (4000, 4096)):
        whole = torch.randn(ranks.size * vocab, columns, device=ranks.device).to(torch.bfloat16)
        start = ranks.rank * vocab
        table = whole[start : start + vocab].contiguous()
        for rows in (1, 17, 256, 2048):
            for two_shot in (False, True):
                ids = torch.randint(0, len(whole), (rows,), device=ranks.device)
                taken = symmetric_kernels.look_up(ids, table, start, ranks.inboxes, two_shot)
                found["cases"] += 1
                if not torch.equal(taken, whole[ids]):
                    found["wrong"].append([vocab, columns, rows, two_shot])
    return found


def winners(ranks: SymmetricCollectives) -> dict[str, Any]:
    """Choices among scores with many ties, zeros of both signs and infinities, against the plain way."""
    found: dict[str, Any] = {"cases": 0, "wrong": [], "not alike": []}
    for rows in (1, 2, 63, 64, 129, 256, symmetric_kernels.MAX_PAIRS):
        for levels in (1, 3, 1000000):
            scores = (torch.randn(ranks.size, rows, device=ranks.device) * levels).round() / levels
            scores[:, ::5] = 0.0
            scores[rows % ranks.size, ::5] = -0.0
            scores[:, 1::6] = -torch.inf
            scores[rows % ranks.size, 3::7] = torch.nan
            tokens = torch.randint(0, 75000, (ranks.size, rows), device=ranks.device)
            tokens += 75000 * torch.arange(ranks.size, device=ranks.device)[:, None]
            tokens = torch.where(scores.isnan(), ~tokens, tokens)
            best, token = scores[ranks.rank].contiguous(), tokens[ranks.rank].contiguous()
            chosen = argmax_ranks(best, token, ranks)
            reference = tokens.gather(0, scores.argmax(dim=0, keepdim=True))[0]
            found["cases"] += 1
            if not torch.equal(chosen, reference):
                found["wrong"].append([rows, levels])
            if not alike(ranks, chosen):
                found["not alike"].append([rows, levels])
    return found


def replays(ranks: SymmetricCollectives, count: int = 3000, kinds: int = 16) -> dict[str, Any]:
    """Graphs replayed over and over with inputs that change, while the ranks dawdle, each at its own times.

    Two graphs, of 8 exchanges each, whose rows overlap; every result is compared on the device.
    """
    rows, columns = 64, 4096
    parts = torch.randn(ranks.size, kinds, rows, columns, device=ranks.device).to(torch.bfloat16)
    totals = torch.zeros(kinds, rows, columns, device=ranks.device)
    for summand in parts:
        totals += summand.float()
    totals = totals.to(torch.bfloat16)
    mine = parts[ranks.rank].contiguous()
    del parts
    scores = torch.randn(ranks.size, kinds, rows, device=ranks.device)
    tokens = torch.arange(ranks.size * kinds * rows, device=ranks.device).view(ranks.size, kinds, rows)
    choices = tokens.gather(0, scores.argmax(dim=0, keepdim=True))[0]
    best, token = scores[ranks.rank].contiguous(), tokens[ranks.rank].contiguous()
    weight = torch.ones(columns, dtype=torch.bfloat16, device=ranks.device)
    step = torch.zeros(1, dtype=torch.int64, device=ranks.device)
    wrong = torch.zeros(1, dtype=torch.int64, device=ranks.device)

    def exchange(number: int, few: int, two_shot: bool) -> None:
        which = (step * 5 + number) % kinds
        part = mine.index_select(0, which)[0, :few].contiguous()
        total = totals.index_select(0, which)[0, :few]
        x = torch.zeros_like(part)
        symmetric_kernels.reduce_add_norm(x, part, weight, EPS, ranks.inboxes, two_shot)
        wrong.add_((x != total).any(dim=1).sum())

    def chain(few: int) -> None:
        """Exchanges with nothing in between, so that a kernel may start before the one ahead has ended."""
        which = [(step * 5 + number) % kinds for number in range(4)]
        summands = [mine.index_select(0, one)[0, :few].contiguous() for one in which]
        x = torch.zeros_like(summands[0])
        expected = torch.zeros_like(x)
        for one in which:
            expected = expected + totals.index_select(0, one)[0, :few]
        for number, part in enumerate(summands):
            symmetric_kernels.reduce_add_norm(x, part, weight, EPS, ranks.inboxes, number == 2)
        wrong.add_((x != expected).any(dim=1).sum())

    def choose(number: int) -> None:
        which = (step + number) % kinds
        chosen = argmax_ranks(best.index_select(0, which)[0], token.index_select(0, which)[0], ranks)
        wrong.add_((chosen != choices.index_select(0, which)[0]).sum())

    def first() -> None:
        step.add_(1)
        exchange(0, rows, False)
        exchange(1, rows, True)
        torch.cuda._sleep(1000 * (1 + ranks.rank))
        exchange(2, 3, False)
        choose(0)
        chain(rows)

    def second() -> None:
        step.add_(3)
        exchange(0, 1, True)
        torch.cuda._sleep(1000 * (ranks.size - ranks.rank))
        exchange(1, 17, False)
        choose(1)
        exchange(2, rows, True)
        chain(5)

    stream = torch.cuda.Stream()
    torch.cuda.synchronize()  # what was made above is there, which another stream does not wait for
    with torch.cuda.stream(stream):
        graphs = [capture(work, stream) for work in (first, second)]
        draw, delays = random.Random(1), random.Random(100 + ranks.rank)
        for _ in range(count):
            if delays.random() < 0.3:
                torch.cuda._sleep(int(10 ** delays.uniform(2, 5.5)))  # cycles: up to 0.16 ms
            graphs[draw.random() < 0.5].replay()
        stream.synchronize()
    return {"steps": int(step), "wrong": int(wrong)}


def capture(work: Callable[[], None], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """After one time outside."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph


CHECKS = {
    "sums": sums,
    "nothing": nothing,
    "lookups": lookups,
    "winners": winners,
    "replays": replays,
}


def main() -> None:
    """As told on the command line: check, store_fd, rank, size, device."""
    job = json.loads(sys.argv[1])
    device = torch.device("cuda", job["rank"])
    torch.cuda.set_device(device)
    torch.manual_seed(5)
    with torch.inference_mode():
        ranks = SymmetricCollectives(job["store_fd"], job["rank"], job["size"], TIMEOUT, device)
        found = {}
        for check in job["checks"]:
            name, _, how = check.partition(", ")
            pdl.ENABLED = how == "early starts"
            found[check] = CHECKS[name](ranks)
    torch.cuda.synchronize()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
