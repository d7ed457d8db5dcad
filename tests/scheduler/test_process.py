"""The scheduler against a fake rank whose tokens depend on every token that its blocks show it."""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduler.helpers import VOCAB, AnyDrafts, World, expected, run_with_aborts, sampling, submit
from tpworker.ipc.arrays import pack_int32, unpack_int32, unpack_int64
from tpworker.ipc.board import Field, Span
from tpworker.ipc.messages import Abort, StepOutput, StepResult, StepTiming, Submit
from tpworker.scheduler.inflight import STEP_PATIENCE, ProtocolError
from tpworker.scheduler.late import StepTimeout

PROMPT = list(range(1, 11))


def run_all(messages: list[Submit], **options: Any) -> World:
    world = World(**options)
    for message in messages:
        world.submit(message)
    world.run()
    for message in messages:
        assert world.tokens[message.request] == expected(message), message
    return world


@pytest.mark.parametrize("lookahead", [0, 1, 2, 3, 4])
def test_a_request_alone(lookahead: int) -> None:
    world = run_all([submit(1, PROMPT)], lookahead=lookahead)
    assert world.finished == {1: "length"}
    # one prefill, seven decodes, and not one step more: the end by length is known beforehand
    assert len(world.executed) == 8


@pytest.mark.parametrize("options", [{"max_model_len": 16}, {"num_blocks": 5}], ids=["length", "blocks"])
@pytest.mark.parametrize("lookahead", [0, 2])
def test_a_prompt_may_fill_the_limit_where_its_token_is_nobodys(
    lookahead: int, options: dict[str, int]
) -> None:
    """What the runtime sends for max_tokens=0; the token needs no KV, and is fed to no step."""
    prompt = list(range(16))
    world = run_all([submit(i, prompt, max_tokens=1) for i in range(3)], lookahead=lookahead, **options)
    assert world.finished == dict.fromkeys(range(3), "length")
    assert not any(plan.decode for plan in world.executed)


def test_plans_run_ahead_of_results() -> None:
    world = World(lookahead=2)
    world.submit(submit(1, PROMPT))
    world.compose()
    assert [plan.step for plan in world.executed] == [0, 1, 2]
    assert not world.tokens[1], "three steps are composed and nobody has seen a token"


def test_who_has_got_a_slot_is_told_with_the_step_that_begins_with_it() -> None:
    """The step's timing is taken for when the request began: an earlier step was launched before it came."""
    world = World(lookahead=2)
    world.submit(submit(1, PROMPT))
    world.compose()
    world.submit(submit(2, PROMPT[::-1]))
    seen = []
    while 2 not in world.cached:
        world.compose()
        seen.append(world.executed[-len(world.answers)])
        world.answer()
    assert [len(plan.admitted) for plan in seen] == [1, 0, 0, 1], "not before its own plan is answered"


def test_plans_run_ahead_to_the_end_where_drafts_may_be_wrong() -> None:
    world = World(lookahead=2, num_drafts=4, max_num_batched_tokens=32)
    drafting: Any = AnyDrafts((4, 4), 0)  # always so many
    world.scheduler.composer.drafting = drafting
    world.submit(submit(1, PROMPT, max_tokens=4))
    world.compose()
    assert [plan.num_drafts for plan in world.executed] == [4, 4, 4]
    world.run()
    assert len(world.tokens[1]) == 4


def test_who_gets_a_slot_brings_another_text(monkeypatch: pytest.MonkeyPatch) -> None:
    renewed: list[int] = []
    monkeypatch.setattr(AnyDrafts, "renew", lambda drafts: renewed.append(1))
    world = World(num_drafts=4, max_num_batched_tokens=32, max_num_seqs=2)
    for request in (1, 2, 3):
        world.submit(submit(request, PROMPT, seed=request))
    world.compose()
    assert len(renewed) == 2
    world.run()
    assert len(renewed) == 3


def test_an_unchanged_decode_batch_is_a_few_bytes() -> None:
    from tpworker.ipc.wire import encode

    world = run_all([submit(1, PROMPT, max_tokens=40)], lookahead=2)
    steady = [plan for plan in world.executed[2:] if not plan.grants]
    assert len(steady) > 25
    assert all(plan.decode is None and len(encode(plan)) < 16 for plan in steady)


@pytest.mark.parametrize("lookahead", [0, 2])
def test_a_stop_token_ends_a_request_and_its_overrun_is_dropped(lookahead: int) -> None:
    free_running = expected(submit(1, PROMPT, max_tokens=30))
    stop = free_running[4]
    messages = [submit(1, PROMPT, max_tokens=30, stop_ids=pack_int32([stop])), submit(2, PROMPT[:5])]
    world = run_all(messages, lookahead=lookahead)
    assert world.tokens[1] == free_running[: free_running.index(stop) + 1]
    assert world.finished[1] == "stop"


def test_a_slot_is_reused_while_old_results_are_on_their_way() -> None:
    """Invariant 5: one slot, so every request follows another in it, with answers two steps late."""
    stop = pack_int32(list(range(0, VOCAB, 4)))
    messages = [submit(i, [i, i + 1, i + 2], max_tokens=12, seed=i, stop_ids=stop) for i in range(1, 8)]
    world = run_all(messages, lookahead=2, max_num_seqs=1)
    assert "stop" in world.finished.values()
    num_tokens = sum(len(tokens) for tokens in world.tokens.values())
    assert len(world.executed) > num_tokens, "nothing was sampled for a request that had ended"


def test_chunks_keep_within_the_budget_and_decodes_come_first() -> None:
    messages = [submit(1, PROMPT[:4], max_tokens=20), submit(2, list(range(40)), max_tokens=3)]
    world = run_all(messages, max_num_batched_tokens=8, max_num_seqs=4, num_blocks=64)
    for plan in world.executed:
        decodes = 0 if plan.decode is None else len(plan.decode) // 4
        assert decodes + sum(chunk.length for chunk in plan.chunks) <= 8
    chunked = [chunk for plan in world.executed for chunk in plan.chunks if chunk.slot == 1]
    assert len(chunked) > 4, "a prompt of 40 tokens under a budget of 8"
    assert [chunk.sample for chunk in chunked] == [False] * (len(chunked) - 1) + [True]


@pytest.mark.parametrize("lookahead", [0, 1, 2, 4])
def test_preemption_by_recompute(lookahead: int) -> None:
    """12 usable blocks of 4 tokens for four requests that want 8 each."""
    messages = [submit(i, [i] * 6, max_tokens=24, seed=i) for i in range(4)]
    world = run_all(messages, lookahead=lookahead, num_blocks=13, prefix_caching=False)
    assert world.scheduler.composer.num_preemptions > 0


def test_a_prefix_is_found_in_the_cache() -> None:
    prompt = list(range(20))
    world = World(lookahead=2)
    for request in (1, 2):
        world.submit(submit(request, prompt, seed=request))
        world.compose()
    world.run()
    assert world.cached == {1: 0, 2: 16}, "all whole blocks, and one token left to compute"
    assert world.tokens[2] == expected(submit(2, prompt, seed=2))


def test_what_a_plan_computes_is_not_shared_within_it() -> None:
    world = World(lookahead=0, max_num_batched_tokens=64)
    world.submit(submit(1, list(range(20))))
    world.submit(submit(2, list(range(20))))
    world.run()
    assert world.cached == {1: 0, 2: 0}


def test_generated_tokens_are_cached_too() -> None:
    first = submit(1, PROMPT, max_tokens=10)
    second = submit(2, PROMPT + expected(first), max_tokens=4)
    world = World(lookahead=2)
    world.submit(first)
    world.compose()
    while 1 not in world.finished:
        world.answer()
        world.compose()
    world.submit(second)
    world.run()
    assert world.cached[2] == 16
    assert world.tokens[2] == expected(second)


@pytest.mark.parametrize("lookahead", [0, 2])
def test_a_last_token_that_came_of_a_wrong_draft_is_not_cached(lookahead: int) -> None:
    """Where it stands, the cache has keys and values of the draft."""
    for length in range(1, 20):
        message = submit(1, PROMPT[:3], max_tokens=40)
        stop = expected(message)[length - 1]
        message = submit(1, PROMPT[:3], max_tokens=40, stop_ids=pack_int32([stop]))
        world = World(lookahead, block_size=1, num_drafts=4, max_num_batched_tokens=32)
        world.submit(message)
        while 1 not in world.finished:
            world.compose()
            while world.answer():  # all of them, so that nothing is in flight
                pass
        known = PROMPT[:3] + expected(message)
        again = submit(2, [*known, 1], max_tokens=4)
        world.submit(again)
        world.run()
        assert world.cached[2] >= len(known) - 1
        assert world.tokens[2] == expected(again)


def test_no_prefix_caching() -> None:
    world = World(prefix_caching=False)
    for request in (1, 2):
        world.submit(submit(request, list(range(20)), seed=request))
        world.compose()
    world.run()
    assert world.cached == {1: 0, 2: 0}


def test_min_tokens_reaches_the_rank_and_survives_preemption() -> None:
    stop = pack_int32(list(range(16)))
    messages = [submit(i, [i] * 6, max_tokens=24, min_tokens=20, seed=i, stop_ids=stop) for i in range(4)]
    world = run_all(messages, num_blocks=13, prefix_caching=False)
    assert all(len(tokens) >= 20 for tokens in world.tokens.values())


def test_delivered_tokens_are_not_sent_again() -> None:
    """A request that comes back after a restart goes on at its position."""
    whole = expected(submit(1, PROMPT, max_tokens=12))
    world = World()
    world.tokens[1] = whole[:5]
    world.scheduler.take(submit(1, PROMPT + whole[:5], num_delivered=5, max_tokens=12))
    world.run()
    assert world.tokens[1] == whole


def test_abort_in_every_state() -> None:
    world = World(lookahead=2, max_num_seqs=2, max_num_batched_tokens=8)
    for request in range(5):
        world.submit(submit(request, list(range(request, request + 12)), max_tokens=20, seed=request))
    world.compose()
    for request in (4, 1, 0):  # waiting, prefilling, decoding with tokens in flight
        world.scheduler.take(Abort(0, request))
    world.scheduler.take(Abort(0, 99))  # never heard of
    world.run()
    assert set(world.finished) == {2, 3}
    for request in (2, 3):
        message = submit(request, list(range(request, request + 12)), max_tokens=20, seed=request)
        assert world.tokens[request] == expected(message)


def test_messages_of_another_generation_are_dropped() -> None:
    world = World()
    world.scheduler.take(Submit(1, 1, pack_int32([1, 2]), 0, sampling()))
    world.scheduler.take(StepResult(5, 0, b"", StepTiming(0, 0, 0)))
    assert not world.compose()


def test_an_answer_out_of_order_is_an_error() -> None:
    world = World()
    world.submit(submit(1, PROMPT))
    world.compose()
    world.answers.popleft()
    with pytest.raises(ProtocolError, match="answer to step 1, but the oldest unanswered is 0"):
        world.answer()


def test_an_answer_of_the_wrong_size_is_an_error() -> None:
    world = World()
    world.submit(submit(1, PROMPT))
    world.compose()
    with pytest.raises(ProtocolError, match="2 tokens, 1 counts, 1 numbers of drafts for 1 slots"):
        world.scheduler.take(StepResult(0, 0, pack_int32([1, 2]), StepTiming(0, 0, 0)))


@pytest.mark.parametrize(
    ("counts", "proposed", "error"),
    [
        ([2], [0], r"\[2\] tokens, where at most \[1\]"),
        ([-1], [0], "2 tokens, 1 counts"),
        ([1, 1], [0, 0], "2 counts, 2 numbers of drafts for 1 slots"),
        ([1], [1], r"\[1\] drafts, where at most \[1\] tokens"),
        ([1], [-1], r"\[-1\] drafts"),
    ],
)
def test_an_answer_of_more_than_was_asked_for_is_an_error(
    counts: list[int], proposed: list[int], error: str
) -> None:
    world = World()
    world.submit(submit(1, PROMPT))
    world.compose()
    tokens = pack_int32([3] * (2 if counts == [-1] else sum(counts)))
    counted = {"counts": pack_int32(counts), "proposed": pack_int32(proposed)}
    with pytest.raises(ProtocolError, match=error):
        world.scheduler.take(StepResult(0, 0, tokens, StepTiming(0, 0, 0), **counted))


request_strategy = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(0, 2), min_size=1, max_size=30),
        "max_tokens": st.integers(1, 30),
        "seed": st.integers(0, 2),
        "stops": st.lists(st.integers(0, VOCAB - 1), max_size=3),
        "min_tokens": st.integers(0, 4),
        "abort_after": st.none() | st.integers(0, 12),
    }
)


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(request_strategy, min_size=1, max_size=10),
    lookahead=st.integers(0, 4),
    slots=st.integers(1, 4),
    budget=st.integers(4, 20),
    num_blocks=st.integers(17, 40),
    block_size=st.sampled_from([4, 8]),
    caching=st.booleans(),
    num_drafts=st.sampled_from([0, 1, 2, 4, 8]),
    seed=st.integers(0, 2**16),
)
def test_any_mix_gives_what_each_request_gives_alone(
    requests: list[dict[str, Any]],
    lookahead: int,
    slots: int,
    budget: int,
    num_blocks: int,
    block_size: int,
    caching: bool,
    num_drafts: int,
    seed: int,
) -> None:
    """The oracle: batch mix, lookahead, preemption, prefix hits, drafts and aborts change no token."""
    world = World(
        lookahead,
        num_blocks,
        block_size,
        seed,
        max_num_seqs=slots,
        max_num_batched_tokens=max(budget, slots) * (1 + num_drafts),
        prefix_caching=caching,
        num_drafts=num_drafts,
    )
    messages = {}
    for number, request in enumerate(requests):
        messages[number] = submit(
            number,
            request["prompt"],
            max_tokens=request["max_tokens"],
            min_tokens=min(request["min_tokens"], request["max_tokens"]),
            seed=request["seed"],
            stop_ids=pack_int32(request["stops"]),
        )
        world.submit(messages[number])
        world.compose()
        if number % 2:
            world.answer()
    aborted = {n: r["abort_after"] for n, r in enumerate(requests) if r["abort_after"] is not None}
    run_with_aborts(world, messages, aborted)


@pytest.mark.parametrize("num_drafts", [1, 4])
@pytest.mark.parametrize("lookahead", [0, 2])
def test_a_conversation_finds_what_drafts_that_were_wrong_have_not_left_in_the_cache(
    lookahead: int, num_drafts: int
) -> None:
    """A stop token may fill a block, but stand where a wrong draft was fed, with no step behind it."""
    num_found = 0
    for seed in range(60):
        draw = random.Random(seed)
        world = World(lookahead, 64, 4, seed, num_drafts=num_drafts)
        prompt = draw.choices(range(VOCAB), k=draw.randint(1, 9))
        for turn in range(3):
            message = submit(turn, prompt, seed=seed, stop_ids=pack_int32(range(6)))
            world.submit(message)
            while turn not in world.finished:
                world.compose()
                for _ in range(draw.randint(1, lookahead + 1)):
                    world.answer()
            assert world.tokens[turn] == expected(message)
            num_found += world.cached[turn] == (len(prompt) - 1) // 4 * 4 > 0
            prompt = [*prompt, *world.tokens[turn], 9]
        world.board.close()
    assert num_found > 20, "all that there may be was found, often enough"


@pytest.mark.parametrize("lookahead", [0, 2, 16])
def test_drafts_for_those_that_had_ended_do_not_count(lookahead: int) -> None:
    """Steps ahead of the results have drafts too, which can be neither right nor wrong. So counts are those
    of outputs, and the same for every lookahead."""
    world = World(lookahead, num_drafts=4, max_num_batched_tokens=64)
    world.scheduler.composer.drafting = world.scheduler.drafting
    world.scheduler.drafting.choose = lambda num_sampled, most: most  # type: ignore[method-assign]
    outputs: list[StepOutput] = []
    deliver = world._deliver
    world._deliver = lambda output: (outputs.append(output), deliver(output))[1]  # type: ignore[method-assign]
    for number in range(8):
        world.submit(submit(number, PROMPT[number:], seed=number, max_tokens=20))
    world.run()
    chances = world.scheduler.drafting.chances
    assert sum(chances.num_drafts) == sum(sum(unpack_int32(output.proposed)) for output in outputs) > 100
    with_several = [Counter(unpack_int64(output.requests)) for output in outputs]
    assert sum(chances.num_accepted) == sum(sum(step.values()) - len(step) for step in with_several) > 50


def test_the_fake_rank_would_notice_a_wrong_block() -> None:
    """The oracle itself: with one block's content changed under it, the output is another."""
    world = World(lookahead=0)
    message = submit(1, PROMPT)
    world.submit(message)
    world.compose()
    world.rank._blocks[world.scheduler.composer.running[0].blocks[0]][1] = 49
    world.run()
    assert world.tokens[1] != expected(message)


class LateAnswer:
    """A channel whose next message is the oldest answer of a world."""

    def __init__(self, world: World) -> None:
        self.world = world

    def receive_now(self) -> Any:
        return self.world.answers.popleft() if self.world.answers else None


class Ready:
    """A poller that finds these channels ready."""

    def __init__(self, *channels: Any) -> None:
        self.channels = list(channels)

    def wait(self, timeout: float | None) -> list[Any]:
        return self.channels


def test_a_step_that_is_not_answered_in_time_is_an_error_that_says_where_each_rank_is() -> None:
    world = World(lookahead=1, step_timeout=0.01)
    world.submit(submit(1, PROMPT))
    world.compose()
    time.sleep(0.02)
    with pytest.raises(StepTimeout, match=r"within 0.01 s .*tpworker-rank0 received 0, admitted 0"):
        world.scheduler.receive(Ready())  # type: ignore[arg-type]


def test_how_long_composing_took_is_on_the_board() -> None:
    world = World(lookahead=1)
    row = world.board.rows()[0]
    assert world.scheduler.receive(Ready())  # type: ignore[arg-type]
    world.compose()
    assert not any(row.times(Span.COMPOSE).counts), "there was nothing to compose"
    world.submit(submit(1, PROMPT))
    world.compose()
    times = row.times(Span.COMPOSE)
    assert sum(times.counts) == 1
    assert 0 < times.total_ns < time.monotonic_ns() - row[Field.BEAT]


def test_answers_that_are_here_count_however_late_they_are_seen() -> None:
    world = World(lookahead=1, step_timeout=0.01)
    world.submit(submit(1, PROMPT))
    world.compose()
    time.sleep(0.02)
    assert world.scheduler.receive(Ready(LateAnswer(world)))  # type: ignore[arg-type]
    assert len(world.scheduler.in_flight) == 0


def test_a_deadline_that_is_chosen_is_on_the_board_before_ranks_wait() -> None:
    world = World(lookahead=0, step_timeout=0.0, shortest_deadline=3.0)
    seen: list[int] = []
    send = world.plans.send_encoded

    def send_encoded(data: bytes) -> None:
        seen.append(world.board.rows()[0][Field.DEADLINE])
        send(data)

    world.plans.send_encoded = send_encoded  # type: ignore[method-assign]
    world.submit(submit(1, PROMPT, max_tokens=6))
    world.run()
    assert seen[:2] == [60_000, 60_000], "nothing is known of the first steps"
    assert set(seen[2:]) == {3000}
    given = World(step_timeout=0.5)
    given.submit(submit(1, PROMPT))
    given.compose()
    assert given.board.rows()[0][Field.DEADLINE] == 500


def test_the_longest_deadline_of_the_plans_in_flight_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that is behind reads it for its own step, which may be the slower one."""
    world = World(lookahead=1, step_timeout=0.0)
    monkeypatch.setattr(world.scheduler.deadlines, "of", lambda num_tokens: 7.0 if num_tokens > 1 else 6.0)
    row = world.board.rows()[0]
    world.submit(submit(1, [1, 2, 3]))
    world.compose()
    assert [plan.num_tokens for plan in world.scheduler.in_flight._plans] == [3, 1]
    assert (row[Field.DEADLINE], world.scheduler.in_flight.deadline) == (7000, 7.0)
    assert world.scheduler.in_flight.patience.seconds == 7.0 * STEP_PATIENCE
    world.answer()
    world.compose()
    assert (row[Field.DEADLINE], world.scheduler.in_flight.deadline) == (6000, 6.0)
    assert world.scheduler.in_flight.patience.seconds == 6.0 * STEP_PATIENCE


def test_a_chosen_deadline_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(lookahead=1, step_timeout=0.0)
    monkeypatch.setattr(world.scheduler.deadlines, "of", lambda num_tokens: 0.01)
    world.submit(submit(1, PROMPT))
    world.compose()
    time.sleep(0.02)
    with pytest.raises(StepTimeout, match=r"within 0.01 s \(chosen from what steps took before\)"):
        world.scheduler.receive(Ready())  # type: ignore[arg-type]


def test_what_a_step_took_is_what_was_waited_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(lookahead=1, step_timeout=0.0)
    told: list[tuple[int, float]] = []
    monkeypatch.setattr(world.scheduler.deadlines, "answered", lambda *step: told.append(step))
    world.submit(submit(1, [1, 2, 3]))
    world.compose()
    time.sleep(0.02)
    world.answer()
    world.answer()
    assert [num_tokens for num_tokens, _ in told] == [3, 1]
    assert told[0][1] >= 0.02 > told[1][1], "the second has been the next to be answered since the first was"
