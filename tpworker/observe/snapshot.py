"""What a tpworker does at an instant, as `tpworker top` shows it and GET /top tells it in JSON.

Counters count from the start of the generation (those of `Whole`, from the runtime's): what happens in a
second is the difference of two snapshots, see top/rates.py.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A rank's GPU. What the driver does not tell is None."""

    uuid: str = ""
    name: str = ""
    utilization: int | None = None
    """Percent of the last moments in which some kernel ran."""
    memory_used: int | None = None
    """Bytes, of all processes."""
    memory_total: int | None = None
    temperature: int | None = None
    """°C."""
    power: float | None = None
    """W."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """What all processes have."""

    pid: int = 0
    cpu_seconds: float | None = None
    memory_bytes: int | None = None
    """Resident, what it shares with others included."""


@dataclass(frozen=True, kw_only=True)
class Rank(Process):
    """A rank's process."""

    rank: int = 0
    phase: str = ""
    """What it is at: 'loading', …, 'ready'."""
    progress: float | None = None
    """Share of that which is done; None: not known."""
    received: int = 0
    """Steps whose plan has come; and those below: that passed the barrier, were launched, are done."""
    admitted: int = 0
    launched: int = 0
    completed: int = 0
    barriers: int = 0
    """At which it has waited for others, and for how long in all."""
    barrier_seconds: float = 0.0
    barrier_buckets: tuple[int, ...] = ()
    """How many of these waits took how long, by the bounds in `ipc.board.BOUNDS_NS`; the last is those above
    all of them. So are all buckets here."""
    last_arrivals: int = 0
    """Of these: to which it came last."""
    weights_bytes: int = 0
    gpu: Gpu | None = None


@dataclass(frozen=True, kw_only=True)
class Scheduler(Process):
    """The scheduler's process."""

    phase: str = ""
    launched: int = 0
    """Steps that were sent, and below: that were answered."""
    completed: int = 0
    running: int = 0
    """Requests that have a slot."""
    waiting: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    prompt_tokens: int = 0
    """Of requests that got a slot."""
    cached_tokens: int = 0
    """Of these: found in the prefix cache."""
    prefilled_tokens: int = 0
    """Of prompts, computed."""
    output_tokens: int = 0
    preemptions: int = 0
    drafts: int = 0
    accepted: int = 0
    gaps: int = 0
    """Steps that decode, and followed another at once."""
    gap_seconds: float = 0.0
    """For which the device had nothing to do before these."""
    busy_seconds: float = 0.0
    """For which the device ran steps."""
    publishes: int = 0
    """Steps whose tokens rank 0 has sent."""
    publish_seconds: float = 0.0
    """From their ends on the device until then."""
    publish_buckets: tuple[int, ...] = ()
    compose_seconds: float = 0.0
    """From the scheduler's waking up until the plans were sent that could be."""
    compose_buckets: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Whole(Process):
    """The runtime: its process, which serves, and what it has done since its start."""

    state: str = ""
    """A `RuntimeState`."""
    running: int = 0
    """Requests that have got a slot."""
    waiting: int = 0
    """Those that have not, and those still tokenised."""
    output_tokens: int = 0
    finished: int = 0
    aborted: int = 0
    restarts: int = 0
    """Because processes were lost."""
    resumed: int = 0
    """Requests that went on after a restart."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """An open request."""

    name: str = ""
    number: int = 0
    """Its name towards the scheduler."""
    state: str = ""
    """'waiting' or 'running'."""
    age_seconds: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All of it."""

    version: str = ""
    time: float = 0.0
    """time.time()."""
    clock: float = 0.0
    """time.monotonic(), for differences."""
    age_seconds: float = 0.0
    """Of the generation."""
    generation: int = 0
    """Of its processes: one more with each time that they were started."""
    model: str = ""
    """The last part of its folder's name, or what the server calls it."""
    device: str = ""
    dtype: str = ""
    max_num_seqs: int = 0
    max_model_len: int = 0
    block_size: int = 0
    lookahead: int = 0
    num_drafts: int = 0
    runtime: Whole = Whole()
    scheduler: Scheduler = Scheduler()
    ranks: tuple[Rank, ...] = ()
    """(): there are no processes at the moment."""
    requests: tuple[Request, ...] = ()
    """The oldest open ones."""


# ----------------------------------------------------------------------------------------- JSON


def to_json(snapshot: Snapshot) -> dict[str, Any]:
    """For `json.dumps`; `from_json` makes the same of it."""
    return dataclasses.asdict(snapshot)


def from_json(data: Any) -> Snapshot:
    """A snapshot out of JSON, perhaps of another version: what nobody knows here is left out, and what is
    missing stays as it is made.

    Raises:
        ValueError: it is something else.
    """
    try:
        return _from(Snapshot, data)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"this is not what tpworker tells at /top: {error}") from None


def _from(kind: type[T], data: Any) -> T:
    hints = typing.get_type_hints(kind)
    return kind(**{name: _value(hints[name], value) for name, value in data.items() if name in hints})


def _value(hint: Any, value: Any) -> Any:
    options = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _from(hint, value)  # type: ignore[arg-type]
    if type(None) in options:
        return None if value is None else _value(options[0], value)
    if typing.get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        return tuple(_value(options[0], one) for one in value)
    wanted: tuple[type, ...] = {float: (int, float), int: (int,), str: (str,)}.get(hint, ())
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise TypeError(f"{value!r} in the place of {hint}")
    return value
