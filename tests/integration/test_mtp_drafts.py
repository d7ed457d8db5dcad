"""A model's own head makes drafts: no token changes, and each draft is what the head says of all before it.

Heads of random models are hardly ever right. So what they say is compared: a draft in the middle of whatever
is going on (right drafts and wrong ones before it, chunks, prefix hits, preemptions) with one that is made
behind the same tokens as a prompt, alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Glm4MoeConfig, Qwen3Config

from tests.integration import test_oracle as mix
from tests.integration.conftest import VOCAB
from tests.integration.test_drafts import group_with
from tests.model.mtp_reference import make_checkpoint
from tests.model.test_mtp import BASE, GLM
from tpworker.ipc.arrays import pack_int32, unpack_int32
from tpworker.ipc.messages import Submit
from tpworker.rank import process
from tpworker.rank.drafter import Computed, MtpDrafter
from tpworker.rank.slots import SlotTable
from tpworker.testing.in_process import InProcessGroup

Seen = dict[tuple[int, ...], list[int]]
"""By all tokens of a sequence: what was drafted behind them."""


@pytest.fixture(scope="module", params=["qwen3", "glm"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "glm":
        make_checkpoint(folder, Glm4MoeConfig(**GLM | {"vocab_size": VOCAB}))
    else:
        make_checkpoint(folder, Qwen3Config(**BASE | {"vocab_size": VOCAB}))
    return folder


@pytest.fixture(scope="module")
def oracle(folder: Path) -> mix.Oracle:
    alone: mix.Oracle = {}
    with InProcessGroup(folder, lookahead=0, prefix_caching=False) as group:
        for submit in mix.requests():
            output = group.run([submit])[submit.request]
            alone[submit.request] = (output.tokens, output.finish_reason)
    return alone


class Watched(MtpDrafter):
    """Notes what it drafts. The slot table has a history, which this drafter has no need of."""

    seen: Seen

    def draft(self, slots: Tensor, num_drafts: int, computed: Computed | None, is_random: bool) -> None:
        super().draft(slots, num_drafts, computed, is_random)
        state = self._table.state
        for slot in slots.tolist() if num_drafts else ():
            length = int(state.position[slot]) + 1
            if state.most_drafts[slot] and length < state.end[slot]:  # behind the end it may say anything
                known = state.history[slot, :length].tolist()
                self.seen[tuple(known)] = state.drafts[slot, :num_drafts].tolist()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What rank 0, or any, drafts."""
    seen: Seen = {}
    monkeypatch.setattr(process, "make_drafter", lambda settings, *parts: _watched(seen, *parts))
    make_slots = process.make_slots

    def with_history(*arguments: Any) -> SlotTable:
        table = make_slots(*arguments)
        rows = len(table.state.position)
        history = torch.zeros(rows, arguments[-1], dtype=torch.int32)
        table.state = replace(table.state, history=history)
        return table

    monkeypatch.setattr(process, "make_slots", with_history)
    return seen


def _watched(seen: Seen, *parts: Any) -> Watched:
    drafter = Watched(*parts)
    drafter.seen = seen
    return drafter


def expected_drafts(folder: Path, seen: Seen, whole: Mapping[int, list[int]]) -> Seen:
    """Behind each place of these texts: what is drafted there when all before is a prompt."""
    seen.clear()
    with group_with(folder, 1, 2, speculative_method="mtp", lookahead=0, prefix_caching=False) as group:
        for submit in mix.requests():
            text = whole[submit.request]
            for end in range(len(unpack_int32(submit.tokens)), len(text)):
                asked = replace(submit.sampling, max_tokens=2, stop_ids=b"", min_tokens=0)
                number = 1000 * submit.request + end
                group.run([Submit(0, number, pack_int32(text[:end]), 0, asked)])
    found = dict(seen)
    seen.clear()
    return found


@pytest.mark.parametrize(
    ("num_ranks", "num_drafts", "options"),
    [
        (1, 1, {}),
        (2, 2, {}),
        (2, 1, {"num_kv_blocks": 20}),
        (1, 2, {"prepare": True, "max_num_seqs": 7, "check_agreement": False}),
        (1, 2, {"draw": 4, "max_num_seqs": 5}),
        (1, 1, {"prepare": True, "max_num_seqs": 4, "check_agreement": False, "max_num_batched_tokens": 16}),
        (2, 2, {"draw": 5, "prepare": True, "max_num_seqs": 7, "check_agreement": False}),
    ],
    ids=str,
)
def test_tokens_are_those_of_plain_steps_and_drafts_the_heads(
    folder: Path, oracle: mix.Oracle, seen: Seen, num_ranks: int, num_drafts: int, options: dict[str, Any]
) -> None:
    texts = {submit.request: unpack_int32(submit.tokens).tolist() for submit in mix.requests()}
    expected = expected_drafts(folder, seen, {i: texts[i] + oracle[i][0] for i in texts})
    with group_with(folder, num_ranks, num_drafts, speculative_method="mtp", **options) as group:
        group.run(mix.requests())
        mix.compare(group, oracle)
        if "num_kv_blocks" in options:
            assert group.scheduler.composer.num_preemptions > 0
    common = expected.keys() & seen.keys()
    assert len(common) > 60
    firsts = [known for known in common if seen[known][0] != expected[known][0]]
    assert not firsts, f"{len(firsts)} of {len(common)} first drafts differ"
    if num_drafts > 1:  # the head's own steps may need a block that is not granted yet
        pairs = [known for known in common if len(seen[known]) > 1]
        same = sum(seen[known][1] == expected[known][1] for known in pairs)
        assert len(pairs) > 30
        assert same > 0.7 * len(pairs), f"{same} of {len(pairs)} second drafts"


@pytest.mark.parametrize("prepare", [False, True])
def test_the_heads_cache_is_that_of_the_whole_prompt(
    folder: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch, prepare: bool
) -> None:
    """Chunks in the middle of a prompt, which sample nobody, leave the head's keys and values too."""
    drafters: list[Watched] = []
    make = process.make_drafter
    monkeypatch.setattr(process, "make_drafter", lambda *parts: drafters.append(make(*parts)) or drafters[-1])
    submit = Submit(0, 1, pack_int32([i * 7 % VOCAB for i in range(60)]), 0, mix.requests()[1].sampling)
    for budget in (120, 16):
        options: dict[str, Any] = {"max_num_batched_tokens": budget, "prepare": prepare, "max_num_seqs": 4}
        with group_with(
            folder, 1, 1, speculative_method="mtp", check_agreement=False, lookahead=0, **options
        ) as group:
            group.run([submit])
            mid_prompt = [step for step in group.steps if step.num_prefill_tokens and not step.tokens]
            assert len(mid_prompt) == (3 if budget == 16 else 0)
    whole, chunks = (drafter._cache for drafter in drafters)
    for ours, theirs in ((whole.keys[-1], chunks.keys[-1]), (whole.values[-1], chunks.values[-1])):
        mine, other = (x.flatten(0, 1)[8 : 8 + 59] for x in (ours, theirs))  # from block 1 on
        assert float(mine.abs().amin(dim=(1, 2)).max()) > 0
        torch.testing.assert_close(other, mine, rtol=1e-4, atol=1e-5)
