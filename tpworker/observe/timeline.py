"""A timeline as Perfetto (https://ui.perfetto.dev) and chrome://tracing read it: JSON trace events.

    HTTP        async spans                               whatever else is given a span: one group a name
    runtime     deliver            requests: async spans, their phases within; events; recoveries
    scheduler   compose, stream, commit                   counters: requests, KV blocks
    rank 0      launch thread      wait for plan, barrier, launch
                device             the steps as it ran them
                publisher          publish
    rank 1 …

Flow arrows follow each step: stream ─► launch ─► device, of each rank; ─► publish ─► commit ─► deliver, from
rank 0 on. Nothing here knows of files: a method returns the events as text, each ended by a comma, so that
what has been written is an array but for its end, which Perfetto does without.

The format: "Trace Event Format", Google, 2016.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from tpworker.ipc.trace import Kind, Record, launch_ring, publisher_ring
from tpworker.outputs import RequestRecord

HEADER, END = "[\n", "]\n"

_RUNTIME, _SCHEDULER, _RANKS, _GROUPS = 100, 200, 1000, 100_000
"""Process ids; of ranks and groups those of the first. Threads have the ids behind their process': viewers
want all of them to differ."""
_NEXT = 100
_LOW = 2**32 - 1
_MOST_PLANS = 256  # that are remembered
_APART = 2  # ns between a lane's spans

Args = Mapping[str, object]
Lane = tuple[int, int]


class Timeline:
    """The events of one file. Its times count from `now`: viewers compute in doubles, and are exact so.

    Args:
        num_ranks: TP size.
        now: ns of CLOCK_MONOTONIC, as all times that it is given.
    """

    def __init__(self, num_ranks: int, now: int) -> None:
        self._num_ranks = num_ranks
        self._origin = now
        self._of: dict[Lane, str] = {}  # what each lane's events have in common
        self._begun: dict[Lane, int] = {}  # its last span
        self._ended: dict[Lane, int] = {}
        self._last_step: dict[int, tuple[int, int]] = {}  # by ring: generation and step of its last record
        self._plans: dict[tuple[int, int], str] = {}  # what the last plans are made of
        self._counts: dict[str, str] = {}
        self._groups: dict[str, int] = {}
        self._num_spans = 0

    # --------------------------------------------------------------------------------- its ends

    def header(self, pid: int) -> str:
        """What comes first: the names of processes and threads. `pid` is of the runtime's process."""
        parts = [
            HEADER,
            self._process(_RUNTIME, "runtime", ["event loop"]),
            self._process(_SCHEDULER, "scheduler", ["plans"]),
        ]
        threads = ["launch thread", "device", "publisher"]
        parts += [self._process(_rank(r), f"rank {r}", threads) for r in range(self._num_ranks)]
        at = {"time": datetime.now(UTC).isoformat(), "monotonic_ns": self._origin, "pid": pid}
        return "".join([*parts, self.instant(self._origin, "trace begins", at)])

    def footer(self, now: int, num_dropped: int, is_full: bool) -> str:
        """What comes last."""
        name = "trace is full" if is_full else "trace ends"
        return f"{self.instant(now, name, {'dropped': num_dropped})[:-2]}\n{END}"

    def _process(self, pid: int, name: str, threads: Sequence[str], order: int | None = None) -> str:
        """Names a process and its threads, each of which is a lane."""
        order = pid if order is None else order
        parts = [
            f'{{"ph":"M","pid":{pid},"name":"process_name","args":{{"name":{json.dumps(name)}}}}},\n',
            f'{{"ph":"M","pid":{pid},"name":"process_sort_index","args":{{"sort_index":{order}}}}},\n',
        ]
        for number, thread in enumerate(threads):
            of = f'"pid":{pid},"tid":{pid + 1 + number}'
            self._of[pid, number] = of
            self._begun[pid, number] = self._ended[pid, number] = self._origin
            parts += [
                f'{{"ph":"M",{of},"name":"thread_name","args":{{"name":"{thread}"}}}},\n',
                f'{{"ph":"M",{of},"name":"thread_sort_index","args":{{"sort_index":{number}}}}},\n',
            ]
        return "".join(parts)

    # ------------------------------------------------------------------------- steps of threads

    def of(self, record: Record) -> str:
        """The events of a thread's record."""
        match record.kind:
            case Kind.PLANNED:
                return self._planned(record)
            case Kind.LAUNCHED:
                return self._launched(record, (record.ring - launch_ring(0)) // 2)
            case Kind.PUBLISHED:
                return self._published(record, (record.ring - publisher_ring(0)) // 2)
            case Kind.COMMITTED:
                begun, ended, tokens, num_ended = record.values[:4]
                more = f',"tokens":{tokens},"ended":{num_ended}'
                span = self._span((_SCHEDULER, 0), begun, ended, "commit", record, more)
                return span + self._flow("t", (_SCHEDULER, 0), record, 0)
            case Kind.DELIVERED:
                begun, ended, tokens = record.values[:3]
                span = self._span((_RUNTIME, 0), begun, ended, "deliver", record, f',"tokens":{tokens}')
                return span + self._flow("f", (_RUNTIME, 0), record, 0)
        return ""  # of a process that knows more kinds

    def _planned(self, record: Record) -> str:
        begun, composed, streamed, tokens, free_blocks, requests = record.values
        lane, num_prefill, num_decodes = (_SCHEDULER, 0), tokens >> 32, tokens & _LOW
        self._plans[record.generation, record.step] = _name(num_prefill, num_decodes)
        if len(self._plans) > _MOST_PLANS:
            del self._plans[next(iter(self._plans))]
        plan = f',"prefill tokens":{num_prefill},"decoding":{num_decodes}'
        parts = [
            self._span(lane, begun, composed, "compose", record, plan),
            self._span(lane, composed, streamed, "stream", record),
            *(self._flow("s", lane, record, rank) for rank in range(self._num_ranks)),
            self._count(begun, "requests", f'"running":{requests >> 32},"waiting":{requests & _LOW}'),
            self._count(begun, "KV blocks", f'"free":{free_blocks}'),
        ]
        return "".join(parts)

    def _launched(self, record: Record, rank: int) -> str:
        received, admitted, launched = record.values[:3]
        lane = (_rank(rank), 0)
        waited = ""
        if self._last_step.get(record.ring) == (record.generation, record.step - 1):
            waited = self._span(lane, self._ended[lane], received, "wait for plan", record)
        self._last_step[record.ring] = record.generation, record.step
        barrier = self._span(lane, received, admitted, "barrier", record)
        launch = self._span(lane, admitted, launched, "launch", record)
        return waited + barrier + launch + self._flow("t", lane, record, rank)

    def _published(self, record: Record, rank: int) -> str:
        noticed, sent, started, ended = record.values[:4]
        device, publisher = (_rank(rank), 1), (_rank(rank), 2)
        name = self._plans.get((record.generation, record.step), "step")
        step = self._span(device, started, ended, name, record)
        if rank:
            arrow = self._flow("f", device, record, rank)
            return step + arrow + self._span(publisher, noticed, sent, "note", record)
        step += self._flow("t", device, record, 0)
        publish = self._span(publisher, noticed, sent, "publish", record)
        return step + publish + self._flow("t", publisher, record, 0)

    # ------------------------------------------------------------------- requests, and the rest

    def request(self, record: RequestRecord, is_open: bool = False) -> str:
        """A choice of a request.

        Args:
            record: of it.
            is_open: it has not ended, but the trace does, and with that the phase that it is in.
        """
        if is_open:
            record = record._replace(last_token=None)  # there may be more
        phases = [(name, _ns(begun), _ns(ended)) for name, begun, ended in record.phases()]
        args = {
            "request": record.request_id,
            "choice": record.index,
            "finish reason": "open" if is_open else record.finish_reason or "failed",
            "prompt tokens": record.num_prompt_tokens,
            "cached tokens": record.num_cached_tokens,
            "output tokens": record.num_output_tokens,
            "restarts": record.num_resumed,
        }
        if record.error:
            args["error"] = record.error
        return self._async(_RUNTIME, "request", _ns(record.arrived), _ns(record.ended), args, phases)

    def span(self, group: str, name: str, begun: int, ended: int, args: Args) -> str:
        """Something else that took time, in a group of lanes by that name."""
        new = ""
        if group not in self._groups:
            self._groups[group] = _GROUPS + _NEXT * len(self._groups)
            new = self._process(self._groups[group], group, [], order=0)
        return new + self._async(self._groups[group], name, begun, ended, args)

    def recovery(self, begun: int, ended: int, args: Args) -> str:
        """From a loss to its end."""
        return self._async(_RUNTIME, "recovery", begun, ended, args)

    def instant(self, now: int, name: str, args: Args) -> str:
        """Something that has happened."""
        return (
            f'{{"ph":"i","s":"g",{self._of[_RUNTIME, 0]},"ts":{self._us(now)},"name":{json.dumps(name)},'
            f'"args":{json.dumps(args)}}},\n'
        )

    # ---------------------------------------------------------------------------- single events

    def _us(self, ns: int) -> str:
        """Microseconds, of which trace events are made. What was before the trace, was at its beginning."""
        return f"{max(0, ns - self._origin) * 1e-3:.3f}"

    def _span(self, lane: Lane, begun: int, ended: int, name: str, record: Record, more: str = "") -> str:
        """A lane's spans follow each other, whatever a device's clock says, which is set right at times.

        They do not touch, either: a viewer that rounds might see them overlap, and leave one out.
        """
        begun = max(begun, self._ended[lane])
        self._begun[lane], self._ended[lane] = begun, (ended := max(begun, ended))
        return (
            f'{{"ph":"X",{self._of[lane]},"ts":{(begun - self._origin) * 1e-3:.3f},'
            f'"dur":{max(0, ended - begun - _APART) * 1e-3:.3f},"name":"{name}",'
            f'"args":{{"step":{record.step},"generation":{record.generation}{more}}}}},\n'
        )

    def _flow(self, phase: str, lane: Lane, record: Record, rank: int) -> str:
        """Part of an arrow, which belongs to the lane's last span."""
        number = (record.generation & 0x7F) << 46 | record.step << 6 & (1 << 46) - 1 | rank
        at = (self._begun[lane] - self._origin) * 1e-3
        return (
            f'{{"ph":"{phase}",{self._of[lane]},"ts":{at:.3f},"id":{number},"cat":"step","name":"step",'
            f'"bp":"e"}},\n'
        )

    def _count(self, at: int, name: str, values: str) -> str:
        if self._counts.get(name) == values:
            return ""
        self._counts[name] = values
        return f'{{"ph":"C","pid":{_SCHEDULER},"ts":{self._us(at)},"name":"{name}","args":{{{values}}}}},\n'

    def _async(
        self,
        pid: int,
        name: str,
        begun: int,
        ended: int,
        args: Args,
        phases: Sequence[tuple[str, int, int]] = (),
    ) -> str:
        """A span that may overlap with others of its name, and what it consists of."""
        self._num_spans += 1
        quoted = json.dumps(name)
        of = f'"pid":{pid},"tid":{pid},"id":"0x{self._num_spans:x}","cat":{quoted}'
        told = json.dumps(args, default=str, allow_nan=False)
        parts = [f'{{"ph":"b",{of},"ts":{self._us(begun)},"name":{quoted},"args":{told}}},\n']
        for phase, start, end in phases:
            parts.append(f'{{"ph":"b",{of},"ts":{self._us(start)},"name":"{phase}"}},\n')
            parts.append(f'{{"ph":"e",{of},"ts":{self._us(end)},"name":"{phase}"}},\n')
        parts.append(f'{{"ph":"e",{of},"ts":{self._us(ended)},"name":{quoted}}},\n')
        return "".join(parts)


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _rank(rank: int) -> int:
    """A rank's process id."""
    return _RANKS + _NEXT * rank


def _name(num_prefill: int, num_decodes: int) -> str:
    """What a device has to do in a step."""
    parts = [f"prefill {num_prefill}"] if num_prefill else []
    return ", ".join([*parts, f"decode {num_decodes}"] if num_decodes else parts)
