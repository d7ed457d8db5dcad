"""Which requests make the next plan: continuous batching with chunked prefill under a token budget.

    1. every decoding request gets one token (when blocks run out, the last in order is preempted)
    2. what is left of the budget goes to prompts that are under way, then to new admissions

Each in the order of (priority, arrival), the lowest first: among equal priorities the oldest.

Composing never looks at a token value of a step in flight: a decode entry is a slot number. What it
must not overrun, a request's greatest length, it knows beforehand. A stop token it learns of late: the
steps composed meanwhile compute tokens for that slot that nobody reads.

Where slots have drafts, a plan asks for one token of each, and for as many more as drafts may be right.
Lengths are then the most that there may be, blocks are granted for those, and results set them right. A
request is composed while it may lack a token: near its greatest length ranks give it no more than is left.

Slots and blocks that a plan releases may be given out by the very same plan: what it writes, it writes
after every earlier plan has read. The one thing that waits for results is the re-admission of a
preempted request, whose tokens in flight must be known by then.

Several choices of one client's request (a group) are requests like others, but that their prompt is
computed once: whichever is admitted and finds blocks of it missing computes them, and meanwhile its siblings
are passed over, holding up nobody. From the plan after the one that computes the last of these blocks, they
find them in the prefix cache, and compute what is left: what does not fill a block, or the last block where
the prompt ends with one. No choice leads for good, so it matters to none which others have ended, were
preempted, or came back.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterable
from operator import attrgetter

from tpworker.ipc.arrays import pack_int32
from tpworker.ipc.drafting import most_drafts
from tpworker.ipc.messages import Admission, BatchPlan, Chunk, Grant, Started
from tpworker.scheduler.draft import Draft
from tpworker.scheduler.drafting import Drafting
from tpworker.scheduler.filling import Filling
from tpworker.scheduler.inflight import InFlight, PromptPart
from tpworker.scheduler.kept_blocks import Node
from tpworker.scheduler.kv_blocks import BlockPool
from tpworker.scheduler.queue import Queue
from tpworker.scheduler.requests import Request, State

BLOCKS_AHEAD = 4
"""Blocks granted at a time while there are plenty, so that steady decode needs none for many steps."""

MAX_ADMITTED_TOKENS = 1 << 20
"""Known tokens of the requests that one plan admits, if they are several: 4 MiB. A plan is one message, and
choices, or a shared prefix, would let very many long prompts in at once."""

_by_key = attrgetter("key")


class Composer:
    """Owns the queue, the slots and the blocks; `compose` turns them into plans.

    Args:
        max_num_seqs: number of slots.
        max_num_batched_tokens: token budget of a step, at least max_num_seqs.
        pool: the KV blocks.
        drafting: chooses how many drafts a plan has.
        filling: chooses how much of the budget goes to prompts; None: all that decodes leaves.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        pool: BlockPool,
        drafting: Drafting,
        filling: Filling | None = None,
    ) -> None:
        self.pool = pool
        self.drafting = drafting
        self.filling = filling
        self.waiting = Queue()
        self.running: list[Request] = []  # in the order of their keys
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self._num_asking = 0  # of the running, who want logprobs
        self._num_guided = 0  # of the running
        self._num_prefilling = 0  # of the running
        self._computing: dict[int, Request] = {}  # of groups: who computes what the others will share
        self._num_slots = max_num_seqs
        self._budget = max_num_batched_tokens
        self._free_slots = list(range(max_num_seqs))
        self._released: list[int] = []  # for the next plan
        self._last_decode: list[int] = []
        self._blocked: tuple[int, int, int] | None = None  # what an admission failed for want of blocks at

    # ------------------------------------------------------------------------------ requests

    def add(self, request: Request) -> None:
        """Puts a new request at its place in the queue. It must fit into the pool on its own."""
        assert self.blocks_for(request.max_length - 1) <= self.pool.num_usable, "refused by the runtime"
        request.root = self.pool.root(request.salt, request.id if request.group is None else request.group)
        self.waiting.push(request)

    def finish(self, request: Request) -> None:
        """Ends a request in any state; its slot and blocks are free for the next plan."""
        if request.state is State.WAITING:
            self.waiting.remove(request)
        elif request.state is not State.FINISHED:
            self._take_slot_away(request)
        request.state = State.FINISHED

    def is_idle(self) -> bool:
        """Whether there is no request at all."""
        return not self.running and not self.waiting

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-num_tokens // self.pool.block_size)

    # ------------------------------------------------------------------------------- compose

    def compose(self, generation: int, step: int) -> tuple[BatchPlan, InFlight] | None:
        """The next plan, with the snapshot that its results will be resolved through.

        None when nothing can be computed before a result or a request comes in.
        """
        draft = Draft(self._budget, self._choose_num_drafts())
        self._decode(draft)
        if self.filling is not None and (self._num_prefilling or (self.waiting and self._free_slots)):
            draft.budget = min(draft.budget, self._choose_num_prompt_tokens(draft, self.filling))
        self._prefill(draft)
        self._admit(draft)
        if not draft.decoding and not draft.chunks:
            return None
        for request in draft.prefilling:  # from the next plan on, others may share what this one computes
            self._register(request, request.computed, 0)
            if request.state is State.DECODING:
                self._let_siblings_pass(request)
        in_flight = draft.in_flight(
            step, self._num_asking > 0, self._num_guided > 0, self.pool.take_unanswered()
        )
        return self._plan(draft, generation, step), in_flight

    def _choose_num_drafts(self) -> int:
        """Of the next plan: its rows are bounded, and leave half of the budget to prompts."""
        choices = self.drafting.choices
        if len(choices) == 1 or (self.running and self._num_guided == len(self.running)):
            return 0  # who is guided has none
        num_sampled = len(self.running) + min(len(self.waiting), len(self._free_slots))
        most = most_drafts(choices, num_sampled, self._budget // 2)
        return self.drafting.choose(num_sampled, most)

    def _choose_num_prompt_tokens(self, draft: Draft, filling: Filling) -> int:
        """Of the plan, at most."""
        waiting = self.waiting.num_tokens if self._free_slots else 0
        if self._num_prefilling:
            waiting += sum(r.target - r.computed for r in self.running if r.state is State.PREFILLING)
        return filling.choose(len(draft.decoding), self._budget - draft.budget, waiting)

    def _decode(self, draft: Draft) -> None:
        index = 0
        while index < len(self.running):  # preemption takes requests off its end
            request = self.running[index]
            index += 1
            if request.state is not State.DECODING or request.least_length >= request.max_length:
                continue
            num_drafts = draft.num_drafts if draft.num_drafts and not request.is_guided else 0
            computed = min(request.computed + 1 + num_drafts, request.max_length - 1)
            if computed > request.capacity and not self._grow(request, computed, draft):
                continue
            request.computed = computed
            request.in_flight += 1
            if num_drafts:
                request.drafted += num_drafts
            draft.decoding.append(request)
        draft.budget -= len(draft.decoding) * (1 + draft.num_drafts)

    def _prefill(self, draft: Draft) -> None:
        for request in self.running:
            if request.state is State.PREFILLING:
                self._chunk(request, draft)

    def _admit(self, draft: Draft) -> None:
        num_known = 0
        passed_over = []
        while self.waiting and self._free_slots and draft.budget > 0:
            request = self.waiting.first()
            if request.group in self._computing:
                passed_over.append(self.waiting.pop())
                continue
            num_known += len(request.tokens)
            if draft.admitted and num_known > MAX_ADMITTED_TOKENS:
                break
            if request.in_flight or not self._give_slot(request, draft):
                break
            self._chunk(request, draft)
        for request in passed_over:
            self.waiting.push(request)

    def _chunk(self, request: Request, draft: Draft) -> None:
        length = min(request.target - request.computed, draft.budget)
        if request.wants_prompt_logprobs:
            length = min(length, draft.room_to_tell)
            draft.room_to_tell -= length
        if length == 0:
            return
        sample = request.computed + length == request.target
        chunk = Chunk(request.slot, request.computed, length, sample)
        draft.chunks.append(chunk)
        draft.prefilling.append(request)
        if request.wants_prompt_logprobs:
            draft.told.append(PromptPart(request, chunk.start + 1, *request.tell(chunk)))
        draft.budget -= length
        request.computed += length
        if sample:
            request.state = State.DECODING
            request.in_flight += 1
            self._num_prefilling -= 1

    def _plan(self, draft: Draft, generation: int, step: int) -> BatchPlan:
        decode = [request.slot for request in draft.decoding]
        unchanged = decode == self._last_decode
        self._last_decode = decode
        released, self._released = tuple(self._released), []
        return BatchPlan(
            generation,
            step,
            released,
            tuple(draft.admitted),
            tuple(draft.grants),
            tuple(draft.chunks),
            None if unchanged else pack_int32(decode),
            draft.num_drafts,
        )

    # ----------------------------------------------------------------------- slots and blocks

    def _give_slot(self, request: Request, draft: Draft) -> bool:
        """Admits a waiting request if there are blocks for all of its known tokens."""
        situation = (request.id, self.pool.num_free, len(self.running))
        if situation == self._blocked:
            return False  # nothing has changed: looking a long prompt up again would be for nothing
        shared, node = self._find_prefix(request)
        fresh = self.blocks_for(len(request.tokens)) - len(shared)
        reserve = len(self.running)  # each will want to grow: an admission must not lead to a preemption
        if self.pool.num_free - self.pool.num_idle(shared) < fresh + reserve:
            self._blocked = situation
            return False
        self.waiting.pop()
        if request.group is not None and len(shared) < request.num_shareable(self.pool.block_size):
            self._computing[request.group] = request
        self.pool.share(shared)
        request.slot = heapq.heappop(self._free_slots)
        request.state = State.PREFILLING
        request.blocks = shared + self.pool.allocate(fresh)
        request.capacity = len(request.blocks) * self.pool.block_size
        request.computed = num_cached = len(shared) * self.pool.block_size
        request.target = len(request.tokens)
        request.num_registered, request.last_node = len(shared), node
        insort(self.running, request, key=_by_key)
        self.drafting.renew()
        self._num_prefilling += 1
        self._num_asking += request.wants_logprobs
        self._num_guided += request.is_guided
        self._start(request, num_cached, draft)
        draft.admitted.append(
            Admission(
                request.slot,
                pack_int32(request.tokens),
                request.num_prompt,
                num_cached,
                pack_int32(request.blocks),
                request.sampling,
                request.is_guided,
                request.max_length,
            )
        )
        return True

    def _find_prefix(self, request: Request) -> tuple[list[int], Node]:
        """Blocks of its tokens that are computed already; none behind prompt logprobs still to be told."""
        tokens = request.tokens[: request.num_told + 1] if request.wants_prompt_logprobs else request.tokens
        return self.pool.match(tokens, request.root)

    def _start(self, request: Request, num_cached: int, draft: Draft) -> None:
        """Tells once that it has got a slot. The prompt of several choices counts once, with the first."""
        if request.started:
            return
        request.started = True
        draft.started.append(Started(request.id, num_cached))
        if not request.is_resumed and request.group in (None, request.id):
            self.num_prompt_tokens += request.target
            self.num_cached_tokens += num_cached

    def _grow(self, request: Request, length: int, draft: Draft) -> bool:
        """Grants blocks for so many tokens to a decoding request, or more.

        False: it was preempted, as the last in order of all.
        """
        needed = self.blocks_for(length) - len(request.blocks)
        while self.pool.num_free < needed:
            last = self.running[-1]  # later than `request`, so that this plan has nothing of it yet
            self._preempt(last)
            if last is request:
                return False
        plenty = self.pool.num_free > BLOCKS_AHEAD * len(self.running)
        missing = self.blocks_for(request.max_length - 1) - len(request.blocks)
        blocks = self.pool.allocate(min(max(BLOCKS_AHEAD, needed) if plenty else needed, missing))
        draft.grants.append(Grant(request.slot, len(request.blocks), pack_int32(blocks)))
        request.blocks += blocks
        request.capacity = len(request.blocks) * self.pool.block_size
        return True

    def _preempt(self, request: Request) -> None:
        """By recompute: back to its place in the queue, to be prefilled with all it has by then."""
        self._take_slot_away(request)
        request.state = State.WAITING
        self.waiting.push(request)
        self.num_preemptions += 1

    def _take_slot_away(self, request: Request) -> None:
        self._register(request, min(request.computed, len(request.tokens)), len(request.tokens) - 1)
        self.running.remove(request)
        self._num_prefilling -= request.state is State.PREFILLING
        self._num_asking -= request.wants_logprobs
        self._num_guided -= request.is_guided
        self.pool.release(request.blocks)
        heapq.heappush(self._free_slots, request.slot)
        self._released.append(request.slot)
        request.slot = -1
        request.reset()
        self._let_siblings_pass(request)

    def _let_siblings_pass(self, request: Request) -> None:
        """It computes nothing any more that other choices will share: they need not wait for it."""
        if request.group is not None and self._computing.get(request.group) is request:
            del self._computing[request.group]

    def register_filled(self, requests: Iterable[Request]) -> None:
        """Offers the blocks of decoding requests that answered plans have filled."""
        for request in requests:
            if request.state is State.DECODING:
                self._register(request, len(request.tokens) - 1, len(request.tokens) - 1)

    def _register(self, request: Request, length: int, num_answered: int) -> None:
        """Offers the blocks that are full within `length` tokens, known and computed, to the cache.

        Args:
            num_answered: of the tokens, computed by plans that have been answered.
        """
        end = request.num_registered * self.pool.block_size
        while (start := end) + self.pool.block_size <= length:
            end += self.pool.block_size
            request.last_node = self.pool.register(
                request.last_node,
                request.tokens[start:end],
                request.blocks[request.num_registered],
                end <= num_answered,
            )
            request.num_registered += 1
        request.fills_at = end + self.pool.block_size

    def check_integrity(self) -> None:
        """Asserts what must hold between plans: slots, blocks and lengths fit together."""
        self.pool.check_integrity([request.blocks for request in self.running])
        asking = [request for request in self.running if request.wants_logprobs]
        assert self._num_asking == len(asking), "who wants logprobs is miscounted"
        num_guided = sum(request.is_guided for request in self.running)
        assert self._num_guided == num_guided, "who is guided is miscounted"
        num_prefilling = sum(request.state is State.PREFILLING for request in self.running)
        assert self._num_prefilling == num_prefilling, "whose prompts are under way is miscounted"
        slots = [request.slot for request in self.running]
        assert sorted(slots + self._free_slots) == list(range(self._num_slots)), "a slot is lost or doubled"
        for request in self.running:
            assert request.computed <= request.capacity, f"{request} has outgrown its blocks"
            assert len(request.tokens) <= request.max_length, f"{request} is too long"
            most_drafted = request.in_flight * self.drafting.choices[-1]
            assert 0 <= request.drafted <= most_drafted, f"{request}: its drafts are miscounted"
            if request.state is State.DECODING:
                assert request.computed == request.most_length - 1, f"{request}: KV and tokens differ"
        assert self.running == sorted(self.running, key=_by_key), "the running are out of order"
        for group, request in self._computing.items():
            assert (request.group, request.state) == (group, State.PREFILLING), f"{request} is waited for"
        for request in self.waiting:
            assert not request.blocks, f"{request} waits, but holds blocks"
            assert request.slot == -1, f"{request} waits, but holds a slot"
        if self.is_idle():
            assert self.pool.num_free == self.pool.num_usable, "idle, but not every block is free"
