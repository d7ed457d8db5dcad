"""A scheduler without ranks' work: it echoes. `python -m tpworker.testing.fake_scheduler`, as the real one.

A request's output is its prompt, over and over: token i is prompt[i % len(prompt)], whatever the sampling,
until a stop token, max_tokens or max_model_len; its logprobs are those of `FakeRank`. With drafts, a step has
one token of a request, then two, and so on up to all that there may be, then one. It meets the ranks and
agrees on sizes with them, sends them Stop at the end, and nothing in between. For tests of everything on the
runtime's side of it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from tpworker.ipc.arrays import pack_int32, pack_int64, unpack_int32
from tpworker.ipc.board import Board, Field, Phase
from tpworker.ipc.channels import Channel, accept_all, close_all
from tpworker.ipc.child import RANK_NAME, SchedulerBoot, board_names, run_child
from tpworker.ipc.messages import (
    NO_LOGPROBS,
    Abort,
    Finish,
    PromptLogprobs,
    ResetPrefixCache,
    SchedulerLoad,
    SchedulerReady,
    Started,
    StepOutput,
    StepTiming,
    Stop,
    Submit,
    Vocabulary,
)
from tpworker.scheduler.agreement import allocate, take_offers
from tpworker.testing.fake_rank import logprob_row

STEP_SECONDS = 0.001
STOP_SECONDS = 5.0


@dataclass
class Echo:
    """A request: its number, prompt, and how many tokens it has got."""

    submit: Submit
    prompt: list[int]
    stop_ids: frozenset[int]
    limit: int
    position: int = 0
    num_steps: int = 0

    def token(self, place: int) -> int:
        """The one at that place of prompt and output."""
        return self.prompt[place % len(self.prompt)]

    def logprob_row(self, place: int) -> bytes:
        """See `fake_rank.logprob_row`."""
        return logprob_row([self.token(before) for before in range(place)], self.token(place))

    def tell_of_prompt(self) -> PromptLogprobs:
        """The prompt's logprobs."""
        rows = (self.logprob_row(place) for place in range(1, len(self.prompt)))
        return PromptLogprobs(self.submit.request, 1, b"".join(rows))


@dataclass
class _Rows:
    """What a step's output has of all requests, one after the other."""

    requests: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    proposed: list[int] = field(default_factory=list)
    told: list[int] = field(default_factory=list)
    logprobs: list[bytes] = field(default_factory=list)
    finished: list[Finish] = field(default_factory=list)


class FakeScheduler:
    """Meets runtime and ranks when it is made; `run` echoes until Stop. Tests override what they need."""

    def __init__(self, boot: SchedulerBoot) -> None:
        self.boot = boot
        self.row = Board.attach(boot.board_fd, board_names(boot.num_ranks)).rows()[0]
        self.row[Field.PHASE] = Phase.LOADING
        plans = [Channel.bind(address) for address in boot.plan_addresses]
        ranks = [RANK_NAME.format(rank) for rank in range(boot.num_ranks)]
        self.runtime = Channel.connect(boot.runtime_address, boot.name, boot.generation)
        timeout = boot.settings.start_timeout
        accept_all(list(zip(plans, ranks, strict=True)), boot.generation, timeout)
        self.num_blocks = take_offers(plans, ranks, timeout).num_kv_blocks
        allocate(plans, ranks, boot.generation, self.num_blocks, timeout)
        self.plans = plans
        self.step = 0
        self.drafted = [0] * boot.settings.num_drafts  # by position
        self.accepted = [0] * boot.settings.num_drafts
        self.waiting: list[Echo] = []
        self.running: list[Echo] = []

    def run(self) -> None:
        """Steps until Stop."""
        self.runtime.send(SchedulerReady(self.boot.generation, self.num_blocks))
        self.row[Field.PHASE] = Phase.READY
        while self.receive():
            if self.waiting or self.running:
                time.sleep(STEP_SECONDS)
                self.send(self.output())
        for channel in self.plans:
            channel.send(Stop(self.boot.generation))
        close_all(STOP_SECONDS)

    def receive(self) -> bool:
        """Takes all messages that are here; waits for one if there is nothing to do. False: it was Stop."""
        self.row[Field.BEAT] += 1
        message = self.runtime.receive(0.0 if self.waiting or self.running else None)
        while message is not None:
            match message:
                case Stop():
                    return False
                case Submit():
                    tokens = unpack_int32(message.tokens).tolist()
                    prompt = tokens[: len(tokens) - message.num_delivered]
                    room = self.boot.settings.max_model_len - len(prompt)
                    limit = max(1, min(room, message.sampling.max_tokens))
                    stop_ids = frozenset(unpack_int32(message.sampling.stop_ids))
                    self.waiting.append(Echo(message, prompt, stop_ids, limit, message.num_delivered))
                case Vocabulary():
                    pass
                case ResetPrefixCache():  # it has none
                    self.runtime.send(message)
                case Abort():
                    self.waiting = [echo for echo in self.waiting if echo.submit.request != message.request]
                    self.running = [echo for echo in self.running if echo.submit.request != message.request]
                case _:
                    raise AssertionError(f"not for the scheduler: {message}")
            message = self.runtime.receive_now()
        return True

    def output(self) -> StepOutput:
        """One step: slots are given out, and every running request gets a token."""
        free = self.boot.settings.max_num_seqs - len(self.running)
        started, self.waiting = self.waiting[:free], self.waiting[free:]
        self.running += started
        num_running = len(self.running)
        rows = _Rows()
        for echo in self.running[:]:
            if finish := self.step_of(echo, rows):
                rows.finished.append(Finish(len(rows.tokens) - 1, finish))
                self.running.remove(echo)
        now = time.monotonic_ns()
        self.step += 1
        return StepOutput(
            self.boot.generation,
            self.step - 1,
            pack_int64(rows.requests),
            pack_int32(rows.positions),
            pack_int32(rows.tokens),
            tuple(rows.finished),
            tuple(Started(echo.submit.request, 0) for echo in started),
            sum(len(echo.prompt) for echo in started),
            num_running - len(started),
            StepTiming(now, now, now),
            SchedulerLoad(
                self.num_blocks - 1, 0, 0, 0, tuple(self.drafted), tuple(self.accepted), len(self.drafted)
            ),
            pack_int32(rows.told),
            b"".join(rows.logprobs),
            tuple(
                echo.tell_of_prompt()
                for echo in started
                if echo.submit.sampling.num_prompt_logprobs != NO_LOGPROBS
            ),
            pack_int32(rows.proposed) if self.drafted else b"",
        )

    def step_of(self, echo: Echo, rows: _Rows) -> str:
        """Adds a request's tokens of one step, and returns why it ended; '' if it has not."""
        num_drafts = len(self.drafted) if echo.num_steps else 0
        num_right = echo.num_steps % (1 + num_drafts)
        echo.num_steps += 1
        for place in range(num_drafts):
            self.drafted[place] += 1
            self.accepted[place] += place < num_right
        for place in range(1 + num_right):
            token = echo.token(echo.position)
            if echo.submit.sampling.num_logprobs != NO_LOGPROBS:
                rows.told.append(len(rows.tokens))
                rows.logprobs.append(echo.logprob_row(len(echo.prompt) + echo.position))
            rows.requests.append(echo.submit.request)
            rows.positions.append(echo.position)
            rows.tokens.append(token)
            rows.proposed.append(0 if place else num_drafts)
            echo.position += 1
            if token in echo.stop_ids or echo.position == echo.limit:
                return "stop" if token in echo.stop_ids else "length"
        return ""

    def send(self, output: StepOutput) -> None:
        """Sends one step's output."""
        self.runtime.send(output)


def main(boot: SchedulerBoot) -> None:
    """What the process does."""
    FakeScheduler(boot).run()


if __name__ == "__main__":
    run_child(SchedulerBoot, main)
