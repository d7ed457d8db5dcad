"""A scheduler and a fake rank in one thread, with as many answers held back as the lookahead allows."""

from __future__ import annotations

import os
import random
import weakref
from collections import deque
from typing import Any

from tpworker.ipc.arrays import pack_int32, unpack_int32, unpack_int64
from tpworker.ipc.board import Board
from tpworker.ipc.child import SchedulerSettings, board_names
from tpworker.ipc.masks import MaskBoard
from tpworker.ipc.memory import SharedWords
from tpworker.ipc.messages import (
    LOGPROB_ROW_BYTES,
    Abort,
    BatchPlan,
    Message,
    Sampling,
    StepOutput,
    StepResult,
    Submit,
)
from tpworker.ipc.wire import decode
from tpworker.scheduler.cache_events import CacheEvents
from tpworker.scheduler.kept_blocks import KeptBlocks
from tpworker.scheduler.process import Scheduler
from tpworker.testing.fake_rank import FakeRank, expected_output

VOCAB = 50


def sampling(**changes: Any) -> Sampling:
    fields: dict[str, Any] = {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 7, "max_tokens": 8, "min_tokens": 0,
        "stop_ids": b"",
    }  # fmt: skip
    return Sampling(**{**fields, **changes})


def submit(
    request: int,
    prompt: list[int],
    num_delivered: int = 0,
    *,
    group: int | None = None,
    priority: int = 0,
    salt: str = "",
    **changes: Any,
) -> Submit:
    tokens = pack_int32(prompt)
    return Submit(0, request, tokens, num_delivered, sampling(**changes), group, priority, salt)


def choices(first: int, count: int, prompt: list[int], **changes: Any) -> list[Submit]:
    """Several choices of one request, their numbers from `first` on, which are their seeds too."""
    return [submit(first + i, prompt, group=first, seed=first + i, **changes) for i in range(count)]


def rows_of(logprobs: bytes) -> list[bytes]:
    """Logprob rows, one by one."""
    assert len(logprobs) % LOGPROB_ROW_BYTES == 0
    return [logprobs[i : i + LOGPROB_ROW_BYTES] for i in range(0, len(logprobs), LOGPROB_ROW_BYTES)]


class Wire:
    """Stands in for a channel: what was sent, and what is to be received."""

    def __init__(self) -> None:
        self.sent: deque[Message] = deque()

    def send(self, message: Message) -> None:
        self.sent.append(message)

    def send_encoded(self, data: bytes) -> None:
        self.sent.append(decode(data))


class AnyDrafts:
    """Chooses how many drafts a plan has at random, of what it may have."""

    def __init__(self, choices: tuple[int, ...], seed: int) -> None:
        self.choices = choices
        self._random = random.Random(seed)

    def renew(self) -> None:
        pass

    def choose(self, num_sampled: int, most: int) -> int:
        return self._random.choice([choice for choice in self.choices if choice <= most])


worlds: weakref.WeakSet[World] = weakref.WeakSet()
"""All that there are. tests/scheduler/conftest.py ends them with the test that has made them."""


def close_descriptor(memory: SharedWords) -> None:
    """Unless that was done. What is mapped goes with who looks at it."""
    if memory.owns_fd:
        os.close(memory.fd)
        memory.owns_fd = False


class World:
    """Runs a scheduler against a fake rank, step by step; answers come `lookahead` steps late.

    With `num_drafts`, every plan may have any number of drafts.
    """

    def __init__(
        self,
        lookahead: int = 2,
        num_blocks: int = 64,
        block_size: int = 4,
        seed: int = 0,
        kept: KeptBlocks | None = None,
        events: CacheEvents | None = None,
        **settings: Any,
    ) -> None:
        fields: dict[str, Any] = {
            "lookahead": lookahead, "max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64,
            "vocab_size": VOCAB, "block_size": block_size, "prefix_caching": True,
            "step_timeout": 60.0, "start_timeout": 60.0,
        }  # fmt: skip
        self.board = Board.create(board_names(1))
        self.plans, self.outputs = Wire(), Wire()
        scheduler = SchedulerSettings(**{**fields, **settings})
        self.masks = MaskBoard.create(scheduler.max_num_seqs, scheduler.vocab_size)
        for shared in (self.board, self.masks):
            weakref.finalize(self, close_descriptor, shared._memory)
        worlds.add(self)
        self.scheduler = Scheduler(
            0,
            scheduler,
            num_blocks,
            self.outputs,  # type: ignore[arg-type]
            Wire(),  # type: ignore[arg-type]
            [self.plans],  # type: ignore[list-item]
            self.board,
            self.masks,
            kept,
            events,
        )
        if scheduler.num_drafts:
            drafting: Any = AnyDrafts(self.scheduler.drafting.choices, seed)
            self.scheduler.composer.drafting = drafting
        self.rank = FakeRank(num_blocks, block_size, scheduler.vocab_size)
        self.answers: deque[StepResult] = deque()
        self.tokens: dict[int, list[int]] = {}
        self.finished: dict[int, str] = {}
        self.cached: dict[int, int] = {}
        self.logprobs: dict[int, list[bytes]] = {}
        self.prompt_logprobs: dict[int, list[bytes]] = {}  # of the prompt's tokens but the first, each once
        self.executed: list[BatchPlan] = []
        self._random = random.Random(seed)

    def submit(self, message: Submit) -> None:
        self.tokens[message.request] = []
        self.logprobs[message.request], self.prompt_logprobs[message.request] = [], []
        self.scheduler.take(message)

    def compose(self) -> bool:
        """Composes as far ahead as it may; the rank executes at once, its answers wait."""
        before = self.scheduler.next_step
        self.scheduler.compose_ahead()
        self.execute()
        return self.scheduler.next_step > before

    def execute(self) -> None:
        """The rank executes what has been streamed."""
        while self.plans.sent:
            plan = self.plans.sent.popleft()
            assert isinstance(plan, BatchPlan)
            self.executed.append(plan)
            self.answers.append(self.rank.execute(plan))
            self._check_budget(plan)
        assert len(self.answers) <= self.scheduler.settings.lookahead + 1
        self.scheduler.composer.check_integrity()

    def _check_budget(self, plan: BatchPlan) -> None:
        """Of one that was executed just now: drafts leave half of it to prompts."""
        budget = self.scheduler.settings.max_num_batched_tokens
        fed = self.rank.num_decoding * (1 + plan.num_drafts)
        assert fed + sum(chunk.length for chunk in plan.chunks) <= budget, "more tokens than a step takes"
        assert not plan.num_drafts or fed <= budget // 2, "drafts take what is for prompts"

    def answer(self) -> bool:
        """Lets the scheduler see the oldest result. False: there is none."""
        if not self.answers:
            return False
        self.scheduler.take(self.answers.popleft())
        self.scheduler.forward()
        self.scheduler.remember()
        while self.outputs.sent:
            output = self.outputs.sent.popleft()
            assert isinstance(output, StepOutput)
            self._deliver(output)
        return True

    def _deliver(self, output: StepOutput) -> None:
        requests, positions = unpack_int64(output.requests), unpack_int32(output.positions)
        for request, position, token in zip(requests, positions, unpack_int32(output.tokens), strict=True):
            assert position == len(self.tokens[request]), "a token twice, or a gap"
            assert request not in self.finished, "a token after the end"
            self.tokens[request].append(token)
        for index, drafts in enumerate(unpack_int32(output.proposed)):
            assert not drafts or requests[index] not in requests[:index], "told of at a request's first token"
        for index, row in zip(unpack_int32(output.logprobs_of), rows_of(output.logprobs), strict=True):
            self.logprobs[requests[index]].append(row)
        for told in output.prompt_logprobs:
            assert told.request not in self.finished, "told of after the end"
            known = self.prompt_logprobs[told.request]
            assert told.rows, "nothing is told of"
            assert told.position == len(known) + 1, "a row twice, or a gap"
            known += rows_of(told.rows)
        for finish in output.finished:
            self.finished[requests[finish.index]] = finish.reason
        for started in output.started:
            self.cached[started.request] = started.num_cached

    def run(self) -> None:
        """Until nothing is left to do; answers are seen at random moments."""
        while True:
            progress = self.compose()
            answers = self._random.randint(0 if progress else 1, 2)
            answered = [self.answer() for _ in range(answers)]
            if not any(answered) and not progress:
                break
        assert self.scheduler.composer.is_idle()
        self.scheduler.composer.check_integrity()
        self.board.close()


def expected(message: Submit, max_model_len: int = 64) -> list[int]:
    """What a request gets, whatever else is asked for at the time."""
    prompt = unpack_int32(message.tokens).tolist()
    return expected_output(prompt, message.sampling, VOCAB, max_model_len)


def run_with_aborts(world: World, messages: dict[int, Submit], aborts: dict[int, int]) -> None:
    """Aborts some requests, each at its turn, and runs all others to their ends: each gets what it must.

    Args:
        messages: by request, what was submitted.
        aborts: by request, the turn, from 0 to 12.
    """
    for turn in range(13):
        for request, when in aborts.items():
            if when == turn:
                world.scheduler.take(Abort(0, request))
                world.scheduler.composer.check_integrity()
        world.compose()
        world.answer()
    world.run()
    for request, message in messages.items():
        whole = expected(message)
        if request in aborts:
            assert world.tokens[request] == whole[: len(world.tokens[request])]
        else:
            assert world.tokens[request] == whole
            assert request in world.finished
