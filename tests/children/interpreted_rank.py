"""One rank of the kernels of `tpworker.kernels.symmetric_kernels`, in Triton's interpreter, without a GPU.

The inboxes are memfds, and the ranks are processes that run, and wait for each other, at their own pace.
"""

from __future__ import annotations

import json
import mmap
import random
import sys
import time

import torch
from torch import Tensor

from benchmarks.steps.stand_ins import spread
from tpworker.kernels import symmetric_kernels
from tpworker.kernels.symmetric_kernels import Inboxes

EPS = 1e-6
COLUMNS = (24, 64, 136)


def connect(fds: list[int], rank: int, size: int) -> tuple[Inboxes, list[Tensor]]:
    """The inboxes, one for each rank that there is, and their memory."""
    num_bytes = symmetric_kernels.inbox_bytes(size)
    memories = [torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8) for fd in fds]
    addresses = [memories[peer % len(fds)].data_ptr() for peer in range(size)]
    return spread(Inboxes.of(addresses, rank, torch.device("cpu")), len(fds)), memories


def is_right(inboxes: Inboxes, num_ranks: int, draw: random.Random, make: torch.Generator) -> bool:
    """One exchange: all ranks draw the same one, with the same inputs, which each knows all of.

    With fewer ranks than the group has, the others' inputs are theirs over again.
    """
    rank, size, kind = inboxes.rank, inboxes.size, draw.random()
    sent = torch.arange(size) % num_ranks  # whose input is sent in each rank's place
    if kind < 0.3:
        rows = draw.randint(1, 200)
        scores = (torch.randn(size, rows, generator=make) * 2).round() / 2  # many are equal
        scores[draw.randrange(size)] *= -1.0  # some zeros get a sign
        scores[:, ::7] = -torch.inf
        tokens = torch.randint(0, 1000, (size, rows), generator=make) + 1000 * torch.arange(size)[:, None]
        scores, tokens = scores[sent], tokens[sent]
        best = scores.max(dim=0).values
        expected = tokens.where(scores == best, 1 << 40).min(dim=0).values
        if draw.random() < 0.5:  # marked, by NaN of either sign; twice in a row of 11
            for row in range(0, rows, 11):
                marked = sorted({draw.randrange(num_ranks) for _ in range(2)})
                scores[marked, row] = draw.choice([1, -1]) * torch.nan
                tokens[marked, row] = ~tokens[marked, row]
                expected[row] = tokens[marked[0], row]
            scores, tokens = scores[sent], tokens[sent]
        return torch.equal(symmetric_kernels.argmax(scores[rank], tokens[rank], inboxes), expected)
    rows, columns, two_shot = draw.randint(1, 5), draw.choice(COLUMNS), draw.random() < 0.5
    two_shot = two_shot and num_ranks == size
    if kind < 0.5:
        tables = torch.randn(size, 30, columns, generator=make).half()
        ids = torch.randint(0, size * 30, (rows,), generator=make)
        taken = symmetric_kernels.look_up(ids, tables[rank], 30 * rank, inboxes, two_shot)
        # Who stands in sends rows of its own part of the table, and as often as for the ranks it stands for.
        tables[num_ranks:] = 0.0
        return torch.equal(taken, tables.flatten(0, 1)[ids] * (size // num_ranks))
    if kind < 0.55:
        rows += symmetric_kernels.rows_of(size)  # takes two launches
    parts = torch.randn(size, rows, columns, generator=make).half()[sent]  # bfloat16 would be truncated
    parts[parts.abs() < 0.1] *= 0.0  # zeros of both signs; -0.0 is what marks an empty entry
    total = torch.zeros(rows, columns)
    for part in parts:
        total += part.float()
    total = total.half()
    if 0.55 <= kind < 0.7:
        return torch.equal(symmetric_kernels.all_reduce(parts[rank], inboxes, two_shot), total)
    x = torch.randn(rows, columns, generator=make).half()
    weight = torch.randn(columns, generator=make).half()
    expected = (x.float() + total.float()).half()
    normed = symmetric_kernels.reduce_add_norm(x, parts[rank], weight, EPS, inboxes, two_shot)
    reference = torch.nn.functional.rms_norm(expected.float(), (columns,), weight.float(), EPS)
    return torch.equal(x, expected) and torch.allclose(normed.float(), reference, rtol=2e-3, atol=2e-3)


def main() -> None:
    """As told on the command line: fds, size, row_bytes, rank, exchanges."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    symmetric_kernels._ROW_BYTES = job["row_bytes"]
    inboxes, _memories = connect(job["fds"], job["rank"], job["size"])
    draw, dawdle, make = random.Random(3), random.Random(job["rank"]), torch.Generator().manual_seed(3)
    wrong = []
    for exchange in range(job["exchanges"]):
        if dawdle.random() < 0.2:
            time.sleep(dawdle.random() * 0.005)
        if not is_right(inboxes, len(job["fds"]), draw, make):
            wrong.append(exchange)
    print(json.dumps({"wrong": wrong, "uses": inboxes.row_uses[:5].tolist()}))


if __name__ == "__main__":
    main()
