"""Lays a frame out: as many lines and columns as there is room for, the most telling ones first.

tpworker 0.1.0  qwen3-8b  cuda bfloat16  pid 4242  since 3:12                                        ready
steps       412/s  4.2 µs gap  99% busy  81,234 done  12 µs skew  31 µs to publish
requests    14/64 running  3 waiting  120 done  1 aborted  0 restarts  0 preempted
tokens/s    2,340 output  1,203 prompt  40% of prompts cached  62% of drafts right
KV blocks   ██████████████░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░ 15%  312 of 2,048

process  state  step  CPU  memory  waits  last  GPU  …
oldest requests  state  age  prompt  output  number
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from tpworker.errors import printable
from tpworker.observe.snapshot import Process, Rank, Snapshot
from tpworker.top.rates import RankRates, Rates
from tpworker.top.text import NOTHING, bar, count, duration, percent, rate, size, span

LABEL, VALUE, HEAD = "dim", "bold", "underline"
STATES = {"ready": "green", "running": "green", "failed": "bold red", "stopped": "red"}
"""Others are underway to something: yellow."""
_LABEL_WIDTH = 12
_GAP = 2  # columns between those of a table
_MOST_REQUESTS = 16
_FEWEST_REQUESTS, _FEWEST_RANKS = 3, 4
"""Of each there are so many before there are more of the others, if there are so many."""


@dataclass(frozen=True, slots=True)
class Column:
    """Of a table."""

    title: str
    cells: Sequence[str]
    weight: int
    """Columns of the lowest weight go first where there is no room."""
    is_left: bool = False
    may_shrink: bool = False

    @property
    def width(self) -> int:
        """That all of it takes."""
        return max(map(cell_len, (self.title, *self.cells)))


def frame(
    snapshot: Snapshot, rates: Rates, width: int, height: int | None = None, note: str = ""
) -> list[Text]:
    """Lines of at most `width` columns.

    Args:
        snapshot: what is so.
        rates: what happens.
        width: of the terminal, columns.
        height: lines; None: as many as there are to show.
        note: stands on the last line.
    """
    lines = [_title(snapshot, width), *_summary(snapshot, rates, width)]
    room = None if height is None else max(0, height - len(lines) - bool(note))
    requests = min(len(snapshot.requests), _MOST_REQUESTS)
    processes = _processes(snapshot, rates, width, None if room is None else _for_processes(snapshot, room))
    lines += [Text(), *processes] if processes else []
    if room is not None:
        requests = min(requests, room - (1 + len(processes) if processes else 0) - 2)
    if requests > 0:
        lines += [Text(), *_requests(snapshot, width, requests)]
    if height is not None:
        lines = lines[: max(0, height - bool(note))]
        if note:
            lines += [Text()] * (height - 1 - len(lines))
    if note:
        lines.append(Text(printable(note), LABEL))
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines


def _for_processes(snapshot: Snapshot, room: int) -> int:
    """Lines for the table of processes: some are left to requests where there is room for some of both."""
    kept = min(len(snapshot.requests), _FEWEST_REQUESTS) + 2 if snapshot.requests else 0
    fewest = 3 + min(len(snapshot.ranks), _FEWEST_RANKS)
    return max(0, room - 1 - (kept if room - 1 - kept >= fewest else 0))


# ------------------------------------------------------------------------------------ above


def _title(snapshot: Snapshot, width: int) -> Text:
    whole = snapshot.runtime
    parts = [f"{snapshot.device} {snapshot.dtype}".strip(), f"pid {whole.pid}" if whole.pid else ""]
    if snapshot.age_seconds:
        parts.append(f"since {duration(snapshot.age_seconds)}")
    state = printable(whole.state)
    right = Text(state, STATES.get(state, "yellow"))
    left = Text.assemble(
        (f"tpworker {printable(snapshot.version)}", VALUE), "  ", (printable(snapshot.model), "cyan"), "  ",
        ("  ".join(part for part in map(printable, parts) if part), LABEL),
    )  # fmt: skip
    left.truncate(max(0, width - len(state) - 1), overflow="ellipsis", pad=True)
    return left + " " + right


def _summary(snapshot: Snapshot, rates: Rates, width: int) -> list[Text]:
    scheduler, whole = snapshot.scheduler, snapshot.runtime
    running = f"{scheduler.running}/{snapshot.max_num_seqs}" if snapshot.max_num_seqs else str(whole.running)
    steps = [
        (rate(rates.steps), "/s"), (span(rates.gap_seconds), " gap"), (percent(rates.busy_share), " busy"),
        (count(scheduler.completed), " done"), (span(rates.skew_seconds), " skew"),
        (span(rates.publish_seconds), " to publish"),
    ]  # fmt: skip
    requests = [
        (running, " running"), (count(max(scheduler.waiting, whole.waiting)), " waiting"),
        (count(whole.finished), " done"), (count(whole.aborted), " aborted"),
        (count(whole.restarts), " restarts"), (count(scheduler.preemptions), " preempted"),
    ]  # fmt: skip
    tokens = [
        (rate(rates.output_tokens), " output"), (rate(rates.prompt_tokens), " prompt"),
        (percent(rates.cached_share), " of prompts cached"),
    ]  # fmt: skip
    if snapshot.num_drafts:
        tokens.append((percent(rates.acceptance), " of drafts right"))
    return [
        _labelled("steps", steps, width),
        _labelled("requests", requests, width),
        _labelled("tokens/s", tokens, width),
        _blocks(snapshot, width),
    ]


def _labelled(label: str, parts: Sequence[tuple[str, str]], width: int) -> Text:
    """As many of the parts as fit, and have something to tell."""
    line = Text(label.ljust(_LABEL_WIDTH), LABEL)
    for value, unit in parts:
        if value == NOTHING:
            continue
        part = Text.assemble((value, VALUE), (unit, LABEL))
        if line.cell_len + part.cell_len + (_GAP if line.cell_len > _LABEL_WIDTH else 0) > width:
            break
        line += Text(" " * _GAP) + part if line.cell_len > _LABEL_WIDTH else part
    return line


def _blocks(snapshot: Snapshot, width: int) -> Text:
    total, free = snapshot.scheduler.total_blocks, snapshot.scheduler.free_blocks
    used = total - free
    share = used / total if total else None
    figures = f" {percent(share)}  {used:,} of {total:,}" if total else f" {NOTHING}"
    room = max(0, min(width, 110) - _LABEL_WIDTH - len(figures))
    colour = "red" if (share or 0) > 0.95 else "yellow" if (share or 0) > 0.8 else "green"
    return Text.assemble(
        ("KV blocks".ljust(_LABEL_WIDTH), LABEL), (bar(share, room), colour), (figures, VALUE)
    )


# ------------------------------------------------------------------------------------ tables


def _processes(snapshot: Snapshot, rates: Rates, width: int, room: int | None) -> list[Text]:
    """A line for each, as far as there is room, below a heading."""
    if not snapshot.ranks:
        return []
    whole, scheduler = snapshot.runtime, snapshot.scheduler
    table = [
        _line("runtime", whole.state, None, whole, rates.runtime_cpu),
        _line("scheduler", scheduler.phase, scheduler.launched, scheduler, rates.scheduler_cpu),
        *(_rank_line(rank, one) for rank, one in zip(snapshot.ranks, rates.ranks, strict=True)),
    ]
    columns = [
        Column(title, [row[title] for row in table], weight, is_left=title in ("process", "state"))
        for title, weight in _WEIGHTS.items()
        if title in _ALWAYS or any(row[title] not in ("", NOTHING) for row in table)
    ]
    lines = _table(columns, width, [row["state"] for row in table])
    if room is None or len(lines) <= room:
        return lines
    if room < 4:  # a heading alone tells nothing
        return []
    more = len(lines) - room + 1
    return [*lines[: room - 1], Text(f"… and {more} more ranks: a taller terminal shows them", LABEL)]


_WEIGHTS = {
    "process": 100, "state": 99, "step": 60, "CPU": 70, "memory": 40, "waits": 80, "last": 79,
    "GPU": 78, "GPU memory": 77, "temp": 75, "power": 76, "behind": 20, "weights": 10,
}  # fmt: skip
"""The columns in their order, and which of them stay where there is little room."""
_ALWAYS = ("process", "state", "step", "CPU", "memory")


def _line(name: str, state: str, step: int | None, process: Process, cpu: float | None) -> dict[str, str]:
    return dict.fromkeys(_WEIGHTS, "") | {
        "process": name,
        "state": printable(state),
        "step": "" if step is None else f"{step:,}",
        "CPU": NOTHING if cpu is None else f"{cpu:.0f}%",
        "memory": size(process.memory_bytes),
    }


def _rank_line(rank: Rank, rates: RankRates) -> dict[str, str]:
    gpu = rank.gpu
    progress = "" if rank.progress is None or rank.phase == "ready" else f" {percent(rank.progress)}"
    line = _line(f"rank{rank.rank}", rank.phase + progress, rank.launched, rank, rates.cpu) | {
        "waits": percent(rates.barrier_share),
        "last": percent(rates.last_share),
        "behind": str(max(0, rank.received - rank.completed)),
        "weights": size(rank.weights_bytes) if rank.weights_bytes else "",
    }
    if gpu is not None:
        line |= {
            "GPU": NOTHING if gpu.utilization is None else f"{gpu.utilization}%",
            "GPU memory": f"{size(gpu.memory_used)}/{size(gpu.memory_total)}",
            "temp": NOTHING if gpu.temperature is None else f"{gpu.temperature}°C",
            "power": NOTHING if gpu.power is None else f"{gpu.power:.0f}W",
        }
    return line


def _requests(snapshot: Snapshot, width: int, number: int) -> list[Text]:
    shown = snapshot.requests[:number]
    columns = [
        Column("oldest requests", [printable(one.name) for one in shown], 100, is_left=True, may_shrink=True),
        Column("state", [printable(one.state) for one in shown], 90, is_left=True),
        Column("age", [duration(one.age_seconds) for one in shown], 99),
        Column("prompt", [count(one.prompt_tokens) for one in shown], 80),
        Column("output", [count(one.output_tokens) for one in shown], 85),
        Column("number", [str(one.number) for one in shown], 10),
    ]
    return _table(columns, width, [one.state for one in shown])


def _table(columns: Sequence[Column], width: int, states: Sequence[str]) -> list[Text]:
    """A heading, and a line for each row, of the columns for which there is room.

    Args:
        columns: in their order.
        width: of all of it.
        states: of each row, which colour its state.
    """
    kept = list(columns)
    while len(kept) > 1 and _least_width(kept) > width:
        kept.remove(min(kept, key=lambda column: column.weight))
    over = sum(column.width + _GAP for column in kept) - _GAP - width
    widths = [
        max(_shrunk(column), column.width - max(0, over)) if column.may_shrink else column.width
        for column in kept
    ]
    rows = [[column.title for column in kept], *zip(*(column.cells for column in kept), strict=True)]
    lines = []
    for number, row in enumerate(rows):
        line = Text()
        for column, cell, wide in zip(kept, row, widths, strict=True):
            if line:
                line.append(" " * _GAP)
            cut = set_cell_size(cell, wide - 1) + "…" if cell_len(cell) > wide else cell
            padding = " " * (wide - cell_len(cut))
            style = LABEL
            if number:
                state = states[number - 1]
                style = STATES.get(state, "yellow") if column.title == "state" else ""
            line.append(cut + padding if column.is_left else padding + cut, style)
        lines.append(line)
    return lines


def _shrunk(column: Column) -> int:
    return min(column.width, max(cell_len(column.title), 12)) if column.may_shrink else column.width


def _least_width(columns: Sequence[Column]) -> int:
    return sum(_shrunk(column) + _GAP for column in columns) - _GAP
