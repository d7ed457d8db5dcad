"""The scheduler process: the scheduler's half of the six verbs.

    1 compose   composer.py       2 stream   once encoded, to every rank       6 commit   here

The loop sleeps in the kernel whenever it can do nothing: while as many plans are unanswered as the
lookahead allows, or there is no request at all.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from itertools import accumulate

from tpworker.ipc.arrays import pack_int32, pack_int64
from tpworker.ipc.board import Board, Field, Span
from tpworker.ipc.channels import Channel, Poller
from tpworker.ipc.child import SchedulerSettings
from tpworker.ipc.codec import MessageError
from tpworker.ipc.drafting import draft_choices
from tpworker.ipc.masks import MaskBoard
from tpworker.ipc.messages import (
    Abort,
    BatchPlan,
    Failed,
    Message,
    ResetPrefixCache,
    Said,
    SchedulerLoad,
    StepOutput,
    StepResult,
    Stop,
    Submit,
    Vocabulary,
)
from tpworker.ipc.trace import Kind, Teller
from tpworker.ipc.wire import encode
from tpworker.scheduler.cache_events import CacheEvents
from tpworker.scheduler.commit import Committed
from tpworker.scheduler.composer import Composer
from tpworker.scheduler.deadlines import Deadlines
from tpworker.scheduler.drafting import Drafting
from tpworker.scheduler.filling import filling_of
from tpworker.scheduler.guides import Guides
from tpworker.scheduler.inflight import Answer, InFlight, InFlightPlans
from tpworker.scheduler.kept_blocks import KeptBlocks
from tpworker.scheduler.kv_blocks import BlockPool
from tpworker.scheduler.late import too_late
from tpworker.scheduler.requests import Request, State
from tpworker.scheduler.telling import Telling
from tpworker.scheduler.told import prompt_logprobs
from tpworker.scheduler.traced import end_planned

logger = logging.getLogger(__name__)

COMPILING_SECONDS = 0.25
"""How often to say that we are alive, while grammars are compiled and there is nothing else to do."""


class Scheduler:
    """Composes plans from requests, streams them to the ranks, commits their results.

    Args:
        generation: of the process group; messages of another one are dropped.
        settings: see `SchedulerSettings`.
        num_kv_blocks: blocks of the KV cache, the null block included.
        runtime, results: channels to the runtime, and from rank 0.
        plans: a channel to each rank, in rank order.
        board: the status board, with a row for the scheduler and one for each rank.
        masks: for requests that are held to a grammar.
        kept: what the KV blocks hold, for whoever comes after us; None: nobody does.
        events: of the prefix cache; None: nobody is told.
        trace: told what each step took; None: nobody is.
    """

    def __init__(
        self,
        generation: int,
        settings: SchedulerSettings,
        num_kv_blocks: int,
        runtime: Channel,
        results: Channel,
        plans: list[Channel],
        board: Board,
        masks: MaskBoard,
        kept: KeptBlocks | None = None,
        events: CacheEvents | None = None,
        trace: Teller | None = None,
    ) -> None:
        self.generation = generation
        self.settings = settings
        pool = BlockPool(num_kv_blocks, settings.block_size, settings.prefix_caching, kept, events)
        self._events = events
        self.drafting = Drafting(draft_choices(settings.num_drafts))
        self.filling = filling_of(settings)
        self.composer = Composer(
            settings.max_num_seqs, settings.max_num_batched_tokens, pool, self.drafting, self.filling
        )
        self.deadlines = Deadlines(settings.step_timeout, settings.shortest_deadline)
        self.in_flight = InFlightPlans(settings.lookahead, self.deadlines, self.filling)
        self.next_step = 0
        self._open: dict[int, Request] = {}
        self._num_arrived = 0
        self._committed: list[Said] = []  # not forwarded yet
        self._computed: list[tuple[int, int]] = []  # and what is not remembered: blocks with their contents
        self._filled: list[Request] = []  # and who has filled one
        self.guides = Guides(masks)
        self._runtime = runtime
        self._results = results
        self._plans = plans
        self._board = board
        self._row = board.rows()[0]
        self._telling = Telling(self._row, self.composer, self.drafting)
        self._trace = trace or Teller()

    def run(self) -> None:
        """Until the runtime says Stop."""
        poller = Poller([self._results, self._runtime], [self.guides.bell])
        while self.receive(poller):  # requests, aborts; results: 6 commit
            self.compose_ahead()  # 1 compose, 2 stream
            self.forward()  # what was committed, to the runtime
            self.remember()  # what blocks hold, for requests and schedulers to come
            if self._events is not None:
                self._events.flush()
            self._telling.tell(self.guides.num_compiling, not len(self.in_flight))
        self.guides.let_go()

    def compose_ahead(self) -> None:
        """Composes and streams plans until the lookahead is used up, or there is nothing to compute."""
        first = self.next_step
        while self.in_flight.has_room():
            self._trace.begin(self.next_step)
            composed = self.composer.compose(self.generation, self.next_step)
            if composed is None:
                break
            self._trace.mark()
            self.stream(*composed)
            end_planned(self._trace, composed[1], self.composer)
        if self.next_step > first:
            self._row.took(Span.COMPOSE, time.monotonic_ns() - self._row[Field.BEAT])

    # ------------------------------------------------------------------------------- receive

    def receive(self, poller: Poller) -> bool:
        """Sleeps until there is a message, then takes all that are here. False: it was Stop."""
        ready = poller.wait(self._patience())
        self._row[Field.BEAT] = time.monotonic_ns()
        for channel in ready:
            while (message := channel.receive_now()) is not None:
                if isinstance(message, Stop):
                    return False
                self.take(message)
        self.take_compiled()
        self._check_deadline()  # after all answers that are here: this process may have been the late one
        return True

    def _patience(self) -> float | None:
        """How long to sleep. In slices while there is work, so that a hang can be told from a long step."""
        if len(self.in_flight):
            return self.in_flight.patience.slice()
        assert self.composer.is_idle(), "requests wait, but nothing is in flight and nothing can be composed"
        if self.guides.num_compiling:
            return COMPILING_SECONDS
        gc.collect(0)  # what the last requests left, while nobody waits
        return None

    def take(self, message: Message) -> None:
        """Acts on one message. Those of another generation are dropped."""
        if message.generation != self.generation:
            return  # from before a restart
        match message:
            case StepResult():
                self.commit(message)
            case Submit():
                self._submit(Request(message, self.settings.max_model_len, self._num_arrived))
                self._num_arrived += 1
            case Abort():
                request_or_none = self._open.pop(message.request, None)
                if request_or_none is not None:
                    self._end(request_or_none)
            case Vocabulary():
                self.guides.use(message)
            case ResetPrefixCache():
                self._reset_prefix_cache()
                self._committed.append(message)
            case _:
                raise MessageError(f"not for the scheduler: {message}")

    def _submit(self, request: Request) -> None:
        needed, usable = self.composer.blocks_for(request.max_length - 1), self.composer.pool.num_usable
        if needed > usable:  # the runtime knew of more, before a restart
            reason = f"it may need {needed} KV blocks, and there are {usable} only since a restart"
            self._committed.append(Failed(self.generation, request.id, reason))
            return
        self._open[request.id] = request
        if request.is_guided:
            self.guides.compile(request)
        else:
            self.composer.add(request)

    def _reset_prefix_cache(self) -> None:
        """Nothing computed up to now is found by anybody who gets a slot from now on. Who has one goes on
        with its own blocks, of which later ones depend on earlier ones: it offers none of them."""
        self.composer.pool.forget()
        for request in self.composer.running:
            request.keep_private()

    def take_compiled(self) -> None:
        """Puts requests whose grammars are compiled into the queue."""
        for request, error in self.guides.compiled():
            if request.state is State.FINISHED:  # aborted meanwhile
                continue
            if request.guide is not None:
                self.composer.add(request)
            else:
                self._fail(request, error)

    def _end(self, request: Request) -> None:
        """Nobody wants more tokens of it."""
        if request.is_guided and request.guide is None:  # no one's yet
            request.state = State.FINISHED
        else:
            self.composer.finish(request)

    def _fail(self, request: Request, reason: str) -> None:
        """Ends a request that cannot go on, for a reason of its own."""
        logger.debug("request %d failed: %s", request.id, reason)
        self._end(request)
        del self._open[request.id]
        self._committed.append(Failed(self.generation, request.id, reason))

    # -------------------------------------------------------------------------------- stream

    def stream(self, plan: BatchPlan, in_flight: InFlight) -> None:
        """Encodes a plan once and sends it to every rank."""
        data = encode(plan)
        self.in_flight.add(in_flight)
        # Before any rank begins to wait for another.
        self._row[Field.DEADLINE] = math.ceil(1000 * self.in_flight.longest_deadline)
        for channel in self._plans:
            channel.send_encoded(data)
        if in_flight.guided:
            self.guides.expect(in_flight)
        self.next_step += 1
        self._row[Field.LAUNCHED] = self.next_step

    # -------------------------------------------------------------------------------- commit

    def commit(self, result: StepResult) -> None:
        """Applies a step's tokens, finds what has ended, and makes one message of it for the runtime."""
        self._trace.begin(result.step)
        answer = self.in_flight.answered(result)
        plan = answer.plan
        complete = self._guide(answer) if plan.guided else set()
        told_of_prompts = prompt_logprobs(plan, result)  # of those that have not ended by now
        if self.settings.num_drafts:
            self._learn(answer)
        if self.filling is not None:
            seconds = (result.timing.ended - result.timing.started) / 1e9
            self.filling.answered(plan.num_decodes, plan.num_prefill_tokens, seconds)
        committed = Committed.of(answer, complete)
        self._computed += plan.registered
        self._filled += committed.filled
        for request in committed.ended:
            self.composer.finish(request)
            del self._open[request.id]
        self.guides.answered(plan.step)
        self._row[Field.COMPLETED] = plan.step + 1
        self._telling.answered(plan, result.timing, len(committed.tokens))
        self._committed.append(
            StepOutput(
                self.generation,
                plan.step,
                pack_int64(committed.requests),
                pack_int32(committed.positions),
                pack_int32(committed.tokens),
                tuple(committed.finished),
                plan.started,
                plan.num_prefill_tokens,
                plan.num_decodes,
                result.timing,
                self.load(plan.num_drafts),
                pack_int32(committed.logprobs_of),
                b"".join(committed.logprobs),
                told_of_prompts,
                pack_int32(committed.proposed),
            )
        )
        self._trace.end(Kind.COMMITTED, len(committed.tokens), len(committed.ended))

    def _learn(self, answer: Answer) -> None:
        """How the plan's drafts have done, of requests that had not ended before, and how long it took."""
        plan, timing = answer.plan, answer.result.timing
        decoded = range(plan.num_decodes if plan.num_drafts else 0)
        open_ones = [i for i in decoded if plan.sampled[i].state is not State.FINISHED]
        self.drafting.answered(
            plan.num_drafts,
            plan.num_decodes,
            plan.num_prefill_tokens,
            (timing.ended - timing.started) / 1e9,
            [answer.proposed[i] for i in open_ones],
            [answer.counts[i] for i in open_ones],
        )

    def _guide(self, answer: Answer) -> set[Request]:
        """Tells guides of a step's tokens, and ends requests at fault.

        Returns:
            Those whose output is complete: their grammars leave nothing to say.
        """
        complete = set()
        ends = accumulate(answer.counts)
        for request, count, end in zip(answer.plan.sampled, answer.counts, ends, strict=True):
            guide = request.guide
            if guide is None or request.state is State.FINISHED or not count:
                continue
            token = answer.tokens[end - 1]  # its only one: nobody makes drafts for it
            if token in request.stop_ids and not guide.error:
                continue  # it ends the output; with a grammar at fault it might have come anywhere
            if not guide.commit(token):
                if guide.error:
                    self._fail(request, guide.error)
                else:
                    complete.add(request)
        return complete

    def forward(self) -> None:
        """Sends the runtime what has been committed. The ranks come first: a device may be waiting."""
        for output in self._committed:
            self._runtime.send(output)
        self._committed.clear()

    def remember(self) -> None:
        """Tells the prefix cache and the table for the next generation what answered plans have computed."""
        self.composer.pool.answered(self._computed)
        self.composer.register_filled(self._filled)
        self._computed.clear()
        self._filled.clear()

    def load(self, num_drafts: int = 0) -> SchedulerLoad:
        """See `SchedulerLoad`."""
        composer = self.composer
        return SchedulerLoad(
            composer.pool.num_free,
            composer.num_preemptions,
            composer.num_prompt_tokens,
            composer.num_cached_tokens,
            tuple(self.drafting.chances.num_drafts),
            tuple(self.drafting.chances.num_accepted),
            num_drafts,
        )

    def _check_deadline(self) -> None:
        if len(self.in_flight) and not self.in_flight.patience.left():
            raise too_late(self.in_flight, self.deadlines.is_given, self.guides, self._board.rows()[1:])
