"""Launching: invariant 3 (nothing waits for the device), and what a step leaves in slot table and ring."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.model.helpers import SPEC
from tests.scheduler.helpers import sampling
from tpworker.checkpoint.weights import dummy_weights
from tpworker.ipc.arrays import pack_int32
from tpworker.ipc.messages import Admission, BatchPlan, Chunk
from tpworker.model.decoder import Decoder
from tpworker.model.kv_cache import KVCache
from tpworker.model.tp import Collectives, Shard
from tpworker.rank.collectives import SoleRank
from tpworker.rank.device import CpuDevice, StreamBroken
from tpworker.rank.graphs import MODES
from tpworker.rank.runner import Launched, Runner
from tpworker.rank.sampler import RanksDisagree
from tpworker.rank.slots import SlotTable

CPU = torch.device("cpu")


class Rig:
    """One rank's runner on a model of random weights, with 3 ring rows."""

    def __init__(self, collectives: Collectives | None = None, check_agreement: bool = False) -> None:
        self.device = CpuDevice()
        ranks = collectives or SoleRank()
        shard = Shard.of(SPEC, 0, 1)
        with torch.inference_mode():
            weights = dummy_weights(SPEC, shard, torch.float32, CPU, 1)
            decoder = Decoder(SPEC, weights, shard, SoleRank(), 64)
            self.slots = SlotTable(4, 16, CPU, (0, shard.vocab.local))
            cache = KVCache(SPEC, shard, 20, 4, torch.float32, CPU)
            self.runner = Runner(decoder, cache, self.slots, self.device, ranks, 3, check_agreement)

    def launch(self, plan: BatchPlan) -> Launched:
        return self.runner.launch(plan)

    def row(self, launched: Launched) -> list[int]:
        launched.done.synchronize()
        return launched.ring_row.tolist()  # type: ignore[no-any-return]


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.device.close()


def admission(slot: int, prompt: list[int], blocks: list[int], **changes: Any) -> Admission:
    wanted = sampling(**{"temperature": 0.0, **changes})
    return Admission(slot, pack_int32(prompt), len(prompt), 0, pack_int32(blocks), wanted)


def first_plan(step: int = 0) -> BatchPlan:
    return BatchPlan(0, step, admitted=(admission(2, [3, 4, 5], [1, 2, 3]),), chunks=(Chunk(2, 0, 3, True),))


def test_launching_waits_for_nothing(rig: Rig) -> None:
    gate = threading.Event()
    rig.device.compute.run(lambda: gate.wait(20) and None)
    launched = [
        rig.launch(first_plan()),
        rig.launch(BatchPlan(0, 1, decode=pack_int32([2]))),
        rig.launch(BatchPlan(0, 2)),
    ]
    assert (rig.runner.sampler.ring == -1).all(), "three steps were launched, and none of them has run"
    gate.set()
    rows = [rig.row(step) for step in launched]
    assert [row[0] for row in rows] == [0, 1, 2]
    assert rig.slots.state.position[2] == 5, "a prompt of 3, and two decode steps"
    assert rig.slots.state.last_token[2] == rows[2][1]


def test_a_decode_step_goes_on_from_device_state_alone(rig: Rig) -> None:
    """The same tokens as when everything is prefilled again."""
    rig.launch(first_plan())
    launched = [rig.launch(BatchPlan(0, 1, decode=pack_int32([2])))]
    launched[0].done.synchronize()
    tokens = [int(rig.runner.sampler.ring[0, 1]), rig.row(launched[0])[1]]
    again = BatchPlan(
        0, 2, released=(2,), admitted=(admission(0, [3, 4, 5, *tokens], [4, 5]),),
        chunks=(Chunk(0, 0, 5, True),), decode=b"",
    )  # fmt: skip
    recomputed = rig.row(rig.launch(again))[1]
    continued = rig.launch(BatchPlan(0, 3, decode=pack_int32([2])))
    assert rig.row(continued)[1] == recomputed


def test_a_mixed_step_gives_what_the_parts_give(rig: Rig) -> None:
    rig.launch(first_plan())
    mixed = BatchPlan(
        0, 1, admitted=(admission(0, [9, 8, 7, 6], [4, 5], temperature=0.7, seed=5),),
        chunks=(Chunk(0, 0, 4, True),), decode=pack_int32([2]),
    )  # fmt: skip
    together = rig.row(rig.launch(mixed))[1:]
    other = Rig()
    other.launch(first_plan())
    decoded = other.row(other.launch(BatchPlan(0, 1, decode=pack_int32([2]))))[1]
    alone = BatchPlan(0, 2, admitted=mixed.admitted, chunks=mixed.chunks, decode=b"")
    assert together == [decoded, other.row(other.launch(alone))[1]]
    other.device.close()


def test_a_chunk_in_the_middle_samples_nothing(rig: Rig) -> None:
    plan = BatchPlan(
        0, 0, admitted=(admission(1, [1, 2, 3, 4, 5], [1, 2]),), chunks=(Chunk(1, 0, 3, False),)
    )  # fmt: skip
    launched = rig.launch(plan)
    assert rig.row(launched) == [0]
    assert rig.slots.state.position[1] == 3
    rest = rig.launch(BatchPlan(0, 1, chunks=(Chunk(1, 3, 2, True),)))
    assert len(rig.row(rest)) == 2
    assert rig.slots.state.position[1] == 5


def test_the_ring_goes_round(rig: Rig) -> None:
    rig.launch(first_plan())
    for step in range(1, 8):
        decode = pack_int32([2]) if step == 1 else None
        launched = rig.launch(BatchPlan(0, step, decode=decode))
        assert rig.row(launched)[0] == step
        assert launched.ring_row.data_ptr() == rig.runner.sampler.ring[step % 3].data_ptr()


def chunked_plans() -> list[BatchPlan]:
    """Prompts in chunks beside a request that decodes."""
    long = list(range(3, 24))
    return [
        first_plan(),
        BatchPlan(
            0, 1, admitted=(admission(0, long, [4, 5, 6, 7, 8, 9]),),
            chunks=(Chunk(0, 0, 17, False),), decode=pack_int32([2]),
        ),
        BatchPlan(0, 2, chunks=(Chunk(0, 17, 2, False),), decode=b""),
        BatchPlan(
            0, 3, admitted=(admission(1, [7, 8, 9], [10, 11], temperature=0.9, top_k=9, seed=3),),
            chunks=(Chunk(0, 19, 2, True), Chunk(1, 0, 3, True)), decode=pack_int32([2]),
        ),
        BatchPlan(0, 4, decode=pack_int32([2, 0, 1])),
    ]  # fmt: skip


def test_captured_mixed_steps_give_what_exact_ones_give(rig: Rig) -> None:
    """The prepared runner pads them all."""
    prepared = Rig()
    prepared.runner.prepare(20)
    sizes: list[int] = []
    replay = prepared.runner.steps.forwards.replay
    prepared.runner.steps.forwards.replay = lambda size: (sizes.append(size), replay(size))[1]  # type: ignore[method-assign]
    for plan in chunked_plans():
        assert prepared.row(prepared.launch(plan)) == rig.row(rig.launch(plan))
        for name in ("position", "last_token"):
            ours, theirs = getattr(prepared.slots.state, name), getattr(rig.slots.state, name)
            assert torch.equal(ours[:-1], theirs[:-1]), name
        assert prepared.slots.state.position[-1] == 0, "padding stays where it is"
    assert sizes == [16, 20, 16, 16]
    cache = prepared.runner._cache
    assert all(bool(values.isfinite().all()) for values in cache.keys + cache.values)
    prepared.device.close()


def late_rig(monkeypatch: pytest.MonkeyPatch, captured: list[str], check_agreement: bool = False) -> Rig:
    """Prepared as after a restart. Notes what is captured: steps' names and sizes."""
    rig = Rig(check_agreement=check_agreement)

    def capture_late(work: Any) -> Any:
        kind = work.args[0]
        name = "forward" if isinstance(kind, int) else "slots"
        captured.append(f"{name} {kind if isinstance(kind, int) else kind[0]}")
        return work

    monkeypatch.setattr(rig.device, "capture_late", capture_late)
    monkeypatch.setattr(rig.device, "capture", lambda work: pytest.fail("captured beforehand"))
    rig.runner.prepare_late(20)
    assert captured == []
    return rig


def test_after_a_restart_steps_are_captured_when_their_kinds_have_run(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[str] = []
    late = late_rig(monkeypatch, captured)
    assert (late.runner.sampler.ring == -1).all(), "nothing has run"
    captures = []
    steady = [BatchPlan(0, step) for step in (5, 6)]
    for plan in [*chunked_plans(), *steady]:
        before = len(captured)
        assert late.row(late.launch(plan)) == rig.row(rig.launch(plan))
        assert len(captured) == before, "tokens come first"
        late.runner.catch_up()
        captures.append(captured[before:])
        for name in ("position", "last_token"):
            ours, theirs = getattr(late.slots.state, name), getattr(rig.slots.state, name)
            assert torch.equal(ours[:-1], theirs[:-1]), name
        assert late.slots.state.position[-1] == 0, "padding stays where it is"
    assert captures == [
        ["forward 20", "forward 16", "slots 4", "slots 1"],
        [],  # 20 tokens, of which the largest was captured before
        [],
        ["slots 4"],  # of another mode
        ["slots 4", "slots 4"],  # decode steps, a family of their own
        [],
        [],
    ]
    late.device.close()


def test_after_a_restart_a_few_steps_are_rehearsed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = Decoder.forward

    def note(self: Decoder, batch: Any, cache: KVCache) -> torch.Tensor:
        sizes.append(len(batch.token_ids))
        return forward(self, batch, cache)

    monkeypatch.setattr(Decoder, "forward", note)
    monkeypatch.setattr(rig.device, "compile_ahead", rig.device.compute.run)
    rig.runner.prepare_late(64)
    assert sorted(sizes) == [1, 2, 4, 16, 64]


def test_nothing_is_captured_late_where_values_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[str] = []
    late = late_rig(monkeypatch, captured, check_agreement=True)
    for plan in chunked_plans():
        late.row(late.launch(plan))
        late.runner.catch_up()
    assert captured == []
    late.device.close()


def test_a_mixed_step_of_more_tokens_than_were_captured_is_exact(rig: Rig) -> None:
    prepared = Rig()
    prepared.runner.prepare(8)
    plan = BatchPlan(0, 0, admitted=(admission(0, [5] * 12, [1, 2, 3]),), chunks=(Chunk(0, 0, 12, True),))
    assert prepared.row(prepared.launch(plan)) == rig.row(rig.launch(plan))
    prepared.device.close()


class Liar(SoleRank):
    """A peer that has computed something else."""

    size = 2

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, x + 1]) if x.dtype == torch.uint8 else torch.stack([x, x])


def test_ranks_that_disagree_are_found_in_debug_mode() -> None:
    rig = Rig(Liar(), check_agreement=True)
    launched = rig.launch(first_plan())
    with pytest.raises(StreamBroken, match="step 0: hidden states of ranks") as caught:
        launched.done.synchronize()
    assert isinstance(caught.value.__cause__, RanksDisagree)
    rig.device.close()


def test_a_plan_is_not_changed_by_launching_it(rig: Rig) -> None:
    plan = first_plan()
    copy = dataclasses.replace(plan)
    rig.row(rig.launch(plan))
    assert plan == copy


def test_it_says_when_graphs_are_about_to_be_captured(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    launch = rig.runner.launch
    monkeypatch.setattr(rig.runner, "launch", lambda plan: events.append("run") or launch(plan))
    monkeypatch.setattr(rig.device, "capture", lambda work: events.append("capture") or work)
    rig.runner.prepare(8, lambda: events.append("capturing"))
    at = events.index("capturing")
    assert events[:at] == ["run"] * len(MODES)
    assert set(events[at + 1 :]) == {"capture"}


def test_a_rehearsal_launches_what_captured_steps_do_and_leaves_no_trace(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an excerpt of the model; on the CPU the kernels do run."""
    events: list[Any] = []
    forward, excerpt = Decoder.forward, Decoder.excerpt

    def note(self: Decoder, batch: Any, cache: KVCache) -> torch.Tensor:
        events.append((len(self.weights.layers), len(batch.token_ids)))
        return forward(self, batch, cache)

    def short(self: Decoder) -> Decoder:
        brief = excerpt(self)
        brief.weights = dataclasses.replace(brief.weights, layers=brief.weights.layers[:1])
        return brief

    monkeypatch.setattr(Decoder, "forward", note)
    monkeypatch.setattr(Decoder, "excerpt", short)
    monkeypatch.setattr(rig.device, "compile_ahead", rig.device.compute.run)
    monkeypatch.setattr(rig.device, "capture", lambda work: rig.device.compute.run(work) or work)
    rig.runner.prepare(40)
    rehearsed, run = ({size for layers, size in events if layers == number} for number in (1, 2))
    assert rehearsed == run == {1, 2, 4, 16, 32, 40}
    plain = Rig()
    for this in (rig, plain):
        launched = [this.launch(first_plan()), this.launch(BatchPlan(0, 1, decode=pack_int32([2])))]
        this.row(launched[1])
    assert rig.runner.sampler.ring.tolist() == plain.runner.sampler.ring.tolist()
    plain.device.close()
