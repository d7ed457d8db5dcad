"""A scheduler and its TP ranks as threads of one process: the real loops, runner, publisher, barrier and
messages, without the cost of starting processes. For tests that compare many configurations."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tpworker.ipc.arrays import unpack_int32, unpack_int64, unpack_logprobs
from tpworker.ipc.barrier import Barrier
from tpworker.ipc.board import Board
from tpworker.ipc.channels import Channel, accept_all
from tpworker.ipc.child import RANK_NAME, RankBoot, RankSettings, SchedulerSettings, board_names
from tpworker.ipc.masks import MaskBoard
from tpworker.ipc.messages import Failed, Message, StepOutput, Stop, Submit
from tpworker.model.families import read_spec
from tpworker.rank.device import CpuDevice
from tpworker.rank.process import assemble, connect_loop
from tpworker.runtime.keeping import Keeping
from tpworker.scheduler.agreement import allocate, take_offers
from tpworker.scheduler.process import Scheduler

_names = itertools.count()


@dataclass(slots=True)
class Output:
    """What came back for one request."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    """Of one that failed: why."""
    num_cached: int = 0
    logprobs: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    """Of its tokens, where they are asked for; as `unpack_logprobs`."""
    prompt_logprobs: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    """Of its prompt's tokens but the first, each once, whatever was repeated."""


class InProcessGroup:
    """`with InProcessGroup(folder, num_ranks=2, lookahead=2) as group: group.run(submits)`.

    Args:
        folder: of the model.
        num_ranks: TP size.
        num_kv_blocks: blocks of the KV cache.
        dtype: of weights and KV.
        jitter: delays for each rank's device, see `CpuDevice`.
        check_agreement: debug mode of `Runner`.
        prepare: as ranks do whose device captures graphs: decode batches are padded to a few sizes.
        speculative_method: who makes drafts, if `num_drafts` is set; n-grams have 1 to 3 tokens.
        kv_cache_dtype: `auto`, or `fp8`.
        settings: fields of `SchedulerSettings`.
    """

    def __init__(
        self,
        folder: Path,
        num_ranks: int = 1,
        num_kv_blocks: int = 128,
        dtype: torch.dtype = torch.float32,
        jitter: Callable[[], float] | None = None,
        check_agreement: bool = False,
        prepare: bool = False,
        speculative_method: str = "ngram",
        kv_cache_dtype: str = "auto",
        **settings: Any,
    ) -> None:
        defaults: dict[str, Any] = {
            "lookahead": 2,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 32,
            "max_model_len": 128,
            "vocab_size": read_spec(folder).vocab_size,
            "block_size": 8,
            "prefix_caching": True,
            "step_timeout": 30.0,
            "start_timeout": 30.0,
        }
        self.settings = SchedulerSettings(**{**defaults, **settings})
        self.errors: list[BaseException] = []
        self.outputs: dict[int, Output] = {}
        self.steps: list[StepOutput] = []
        self._folder, self._num_ranks, self._num_kv_blocks = folder, num_ranks, num_kv_blocks
        self._dtype, self._jitter, self._check_agreement = dtype, jitter, check_agreement
        self._prepare = prepare
        self._speculative_method = speculative_method if self.settings.num_drafts else ""
        self._kv_cache_dtype = kv_cache_dtype
        self._address = f"inproc://tpworker-{next(_names)}"
        self._ready = threading.Barrier(2)
        self._barrier = Barrier.create(num_ranks)
        self._board = Board.create(board_names(num_ranks))
        self._meeting = Barrier.create(num_ranks)
        self._masks = MaskBoard.create(self.settings.max_num_seqs, self.settings.vocab_size)
        self._store = os.memfd_create("tpworker-store")
        self._keeping = Keeping(num_ranks)
        self._runtime = Channel.bind(f"{self._address}-runtime")
        self._plans = [Channel.bind(f"{self._address}-plan{rank}") for rank in range(num_ranks)]
        self._results = Channel.bind(f"{self._address}-results")
        scheduler = Channel.connect(f"{self._address}-runtime", "scheduler", 0)
        masks = MaskBoard.attach(self._masks.fd, self.settings.max_num_seqs, self.settings.vocab_size)
        self.scheduler = Scheduler(
            0, self.settings, num_kv_blocks, scheduler, self._results, self._plans, self._board, masks
        )
        work = [(self._schedule,), *((self._rank, rank) for rank in range(num_ranks))]
        self._threads = [threading.Thread(target=self._guard, args=args, daemon=True) for args in work]

    def __enter__(self) -> InProcessGroup:
        for thread in self._threads:
            thread.start()
        self._runtime.accept("scheduler", 0, 30.0)
        self._ready.wait(60)
        return self

    def __exit__(self, *exception: object) -> None:
        self._runtime.send(Stop(0))
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive(), "a thread does not end"
        for channel in (self._runtime, self._results, *self._plans):
            channel.close()
        self._barrier.close()
        self._meeting.close()
        self._masks.close()
        os.close(self._store)
        self._keeping.close()
        self._board.close()
        if exception[0] is None and self.errors:
            raise self.errors[0]

    def send(self, message: Message) -> None:
        """To the scheduler."""
        if isinstance(message, Submit):
            self.outputs[message.request] = Output()
        self._runtime.send(message)

    def run(self, submits: Sequence[Submit], timeout: float = 60.0) -> dict[int, Output]:
        """Submits all at once and waits until every open request has ended."""
        for message in submits:
            self.send(message)
        self.wait(timeout)
        return self.outputs

    def wait(self, timeout: float = 60.0) -> None:
        """Until every open request has ended."""
        deadline = time.monotonic() + timeout
        while any(output.finish_reason is None for output in self.outputs.values()):
            self.step(deadline - time.monotonic())

    def step(self, timeout: float) -> None:
        """Takes one message of the scheduler. Raises what went wrong in a thread."""
        end = time.monotonic() + timeout
        while (message := self._runtime.receive(0.05)) is None:
            if self.errors:
                raise self.errors[0]
            if time.monotonic() > end:
                raise TimeoutError(f"no step within the deadline; {self.outputs}")
        if isinstance(message, StepOutput):
            self._take(message)
        elif isinstance(message, Failed):
            self.outputs[message.request].finish_reason = message.reason

    def _take(self, output: StepOutput) -> None:
        self.steps.append(output)
        requests, positions = unpack_int64(output.requests), unpack_int32(output.positions)
        for request, position, token in zip(requests, positions, unpack_int32(output.tokens), strict=True):
            assert position == len(self.outputs[request].tokens), "a token twice, or a gap"
            self.outputs[request].tokens.append(token)
        rows = unpack_logprobs(output.logprobs)
        for index, row in zip(unpack_int32(output.logprobs_of), rows, strict=True):
            self.outputs[requests[index]].logprobs.append(row)
        for told in output.prompt_logprobs:
            known = self.outputs[told.request].prompt_logprobs
            assert told.position <= len(known) + 1, "a gap"
            known += list(unpack_logprobs(told.rows))[len(known) + 1 - told.position :]
        for finish in output.finished:
            self.outputs[requests[finish.index]].finish_reason = finish.reason
        for started in output.started:
            self.outputs[started.request].num_cached = started.num_cached

    def _guard(self, work: Callable[..., None], *arguments: object) -> None:
        try:
            work(*arguments)
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self.errors.append(error)
        self._barrier.abort()
        self._meeting.abort()
        self._ready.abort()

    def _schedule(self) -> None:
        ranks = [RANK_NAME.format(rank) for rank in range(self._num_ranks)]
        try:
            accept_all(list(zip(self._plans, ranks, strict=True)), 0, 30.0)
            allocate(self._plans, ranks, 0, take_offers(self._plans, ranks, 30.0).num_kv_blocks, 30.0)
            self._results.accept(ranks[0], 0, 30.0)
            self._ready.wait(60)
            self.scheduler.run()
        finally:
            for channel in self._plans:
                channel.send(Stop(0))

    def _boot(self, rank: int) -> RankBoot:
        settings = self.settings
        return RankBoot(
            generation=0,
            name=RANK_NAME.format(rank),
            log_level=0,
            report_fd=0,  # nobody reports: see `_fail`
            rank=rank,
            num_ranks=self._num_ranks,
            plan_address=self._plans[rank].address,
            result_address=self._results.address,
            barrier_fd=self._barrier.fd,
            board_fd=self._board.fd,
            meeting_fd=self._meeting.fd,
            masks_fd=self._masks.fd,
            store_fd=self._store,
            model=str(self._folder),
            settings=RankSettings(
                lookahead=settings.lookahead,
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                max_model_len=settings.max_model_len,
                block_size=settings.block_size,
                num_kv_blocks=self._num_kv_blocks,
                gpu_memory_utilization=1.0,
                device="cpu",
                dtype=str(self._dtype).removeprefix("torch."),
                load_format="auto",
                seed=0,
                check_ranks_agree=self._check_agreement,
                step_timeout=settings.step_timeout,
                start_timeout=settings.start_timeout,
                speculative_method=self._speculative_method,
                num_drafts=settings.num_drafts,
                prompt_lookup_max=3,
                prompt_lookup_min=1,
                kv_cache_dtype=self._kv_cache_dtype,
            ),
            kept_fd=self._keeping.fd(rank),
        )

    def _rank(self, rank: int) -> None:
        torch.set_num_threads(1)
        boot, device = self._boot(rank), CpuDevice(self._jitter)
        row = self._board.row(boot.name)
        plans = Channel.connect(boot.plan_address, boot.name, boot.generation)
        try:
            runner = assemble(boot, device, plans, row)
            if self._prepare:
                runner.prepare(boot.settings.max_num_batched_tokens)
            # A rank that spins would keep the GIL.
            publisher, loop = connect_loop(boot, device, plans, row, runner, self._fail, spin=0.0)
            try:
                loop.run()
            finally:
                publisher.close()
        finally:
            device.close()
            plans.close()
