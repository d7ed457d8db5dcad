"""`tpworker bench`: from its options to tables."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from tpworker.bench.connection import Address, Pool
from tpworker.bench.dataset import read_dataset
from tpworker.bench.lengths import Lengths
from tpworker.bench.load import Level, Measured
from tpworker.bench.picture import check_can_draw, draw
from tpworker.bench.plan import Plan
from tpworker.bench.report import compare, show, to_json, what_is_asked
from tpworker.bench.summary import Goals, Summary, load_of
from tpworker.bench.target import Target, find_out
from tpworker.bench.worker import run_processes
from tpworker.errors import ConfigError, shown

WARM_UP_OUTPUT = 16
"""Tokens of output at most while it is warmed up."""
PLAIN_WIDTH = 120
"""Columns of tables that go to no terminal."""
_WARM_UP = 0  # the level that warms up; those that are measured follow


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What the command line of `tpworker bench` says, checked."""

    url: str
    concurrency: tuple[int, ...]
    rates: tuple[float, ...]
    """Requests a second."""
    shares: tuple[float, ...]
    """Rates as shares of the most that a level of `concurrency` has brought."""
    num_requests: int | None
    seconds: float | None
    prompt_len: Lengths
    output_len: Lengths
    shared_prefix: int = 0
    turns: int = 1
    dataset: str | None = None
    is_chat: bool = False
    as_text: bool = False
    ignore_eos: bool = False
    temperature: float = 0.0
    seed: int | None = None
    warm_up: int = 8
    model: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    api_key: str | None = None
    timeout: float = 600.0
    processes: int = 1
    goals: Goals = field(default_factory=Goals)
    json_file: str | None = None
    picture: str | None = None


def run_bench(options: BenchOptions) -> int:
    """Measures, and prints tables. Returns the exit status: 1 if no request was answered.

    Raises:
        ConfigError: it cannot be measured, for a reason that the user can mend.
        Unreachable: the server does not answer.
    """
    if options.picture is not None:
        check_can_draw(options.picture)
    for flag, file in (("--json", options.json_file), ("--plot", options.picture)):
        if file is not None:
            _check_writable(flag, Path(file))  # hours of measuring shall not end in an error
    is_terminal = sys.stdout.isatty()
    width = None if is_terminal else PLAIN_WIDTH
    console = Console(highlight=False, emoji=False, soft_wrap=not is_terminal, width=width)
    bench = _Bench(options, console)
    try:
        asyncio.run(bench.run())
        if len(bench.summaries) > 1:
            compare(bench.summaries, console)
    finally:  # Ctrl-C, or that nobody reads the tables any more, costs the level that is under way
        if bench.results:
            bench.write()
    return 0 if any(summary.num_done for summary in bench.summaries) else 1


def _check_writable(flag: str, file: Path) -> None:
    """Leaves it as it is: nothing, if there is none. Raises ConfigError."""
    was_there = file.exists()
    with _writing(flag, file):
        file.open("a").close()
        if not was_there:
            file.unlink()


@contextmanager
def _writing(flag: str, file: Path) -> Iterator[None]:
    """Raises ConfigError: it cannot be written."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{flag} {shown(str(file))} cannot be written: {error.strerror or error}") from None


class _Bench:
    target: Target
    plan: Plan
    results: list[tuple[Summary, Sequence[Measured]]]
    """Of the levels that have ended."""

    def __init__(self, options: BenchOptions, console: Console) -> None:
        self._options, self._console = options, console
        self._address = Address.of(options.url)
        self.results = []

    @property
    def summaries(self) -> list[Summary]:
        return [summary for summary, _ in self.results]

    def write(self) -> None:
        """The files that are wanted, with the levels that have ended. Raises ConfigError: they cannot be."""
        options = self._options
        if options.json_file is not None:
            data = to_json(options.url, self.target, self.plan, self.results)
            with _writing("--json", Path(options.json_file)):
                Path(options.json_file).write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
        if options.picture is not None:
            with _writing("--plot", Path(options.picture)):
                draw(Path(options.picture), what_is_asked(self.plan, self.target), self.summaries)

    async def run(self) -> None:
        options = self._options
        pool = Pool(self._address, options.api_key)
        self.target = await find_out(
            pool,
            model=options.model,
            is_chat=options.is_chat,
            needs_lengths=options.dataset is None,
            as_text=options.as_text,
        )
        pool.close()
        self.plan = self._plan()
        self._console.print(what_is_asked(self.plan, self.target), markup=False)
        if options.warm_up:
            await self._warm_up()
        for level in self._levels():
            if sys.stderr.isatty():  # and nothing that moves: it would take its part of the processor
                print(f"{load_of(level)} …", file=sys.stderr)
            measured = await self._run(self.plan, level)
            summary = Summary.of(level, measured, options.goals)
            self.results.append((summary, measured))
            show(summary, self._console)

    def _plan(self) -> Plan:
        options, target = self._options, self.target
        return Plan(
            model=target.model,
            is_chat=options.is_chat,
            # Not the same in two runs, where nobody asks for that: the server may know those prompts.
            seed=secrets.randbits(32) if options.seed is None else options.seed,
            prompt_len=options.prompt_len,
            output_len=options.output_len,
            shared_prefix=options.shared_prefix,
            turns=options.turns,
            ignore_eos=options.ignore_eos,
            temperature=options.temperature,
            token_ids=target.token_ids,
            tokens_per_word=target.tokens_per_word,
            overhead=target.overhead,
            dataset=() if options.dataset is None else read_dataset(options.dataset, options.is_chat),
            extra=options.extra,
        )

    def _levels(self) -> Iterator[Level]:
        """One after the other; what comes of those before is known when the next is asked for."""
        options = self._options
        number = _WARM_UP
        for concurrency in options.concurrency:
            yield self._level(number := number + 1, concurrency=concurrency)
        most = max((summary.requests_per_second for summary in self.summaries), default=0.0)
        rates = [*options.rates, *(share * most for share in options.shares if most)]
        for rate in rates:
            yield self._level(number := number + 1, rate=rate)

    def _level(self, number: int, concurrency: int | None = None, rate: float | None = None) -> Level:
        options = self._options
        num_requests = options.num_requests
        if num_requests is None and options.seconds is None:
            num_requests = max(32, 4 * concurrency) if concurrency else max(32, round(30 * (rate or 0)))
        return Level(
            number=number,
            concurrency=concurrency,
            rate=rate,
            num_requests=num_requests,
            seconds=options.seconds,
            timeout=options.timeout,
        )

    async def _run(self, plan: Plan, level: Level) -> list[Measured]:
        options = self._options
        return await run_processes(self._address, options.api_key, plan, level, options.processes)

    async def _warm_up(self) -> None:
        number, low = self._options.warm_up, min(WARM_UP_OUTPUT, self.plan.output_len.low)
        plan = dataclasses.replace(self.plan, output_len=Lengths(low, low), turns=1)
        level = Level(number=_WARM_UP, concurrency=number, num_requests=number, timeout=self._options.timeout)
        await run_processes(self._address, self._options.api_key, plan, level, 1)
