"""Drafts change no token: whatever their number, with every feature, the output is that of plain steps alone.

fp32, tiny random models. A random model repeats little, so that n-gram look-up finds next to nothing; most of
these tests have a drafter that knows the answers, and errs now and then.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config

from tests.integration import test_features as features
from tests.integration import test_oracle as mix
from tests.model.mtp_reference import make_checkpoint
from tests.model.test_mtp import BASE
from tests.scheduler.helpers import AnyDrafts, sampling
from tpworker.ipc.arrays import pack_int32, unpack_int32
from tpworker.ipc.drafting import draft_choices
from tpworker.ipc.messages import Submit
from tpworker.rank import process
from tpworker.rank.drafter import Computed
from tpworker.rank.slots import SlotTable
from tpworker.testing.in_process import InProcessGroup, Output


class MostDrafts:
    """Chooses as many drafts as a plan may have."""

    def __init__(self, choices: tuple[int, ...]) -> None:
        self.choices = choices

    def renew(self) -> None:
        pass

    def choose(self, num_sampled: int, most: int) -> int:
        return most


def group_with(
    folder: Path, num_ranks: int, num_drafts: int, draw: int | None = None, **options: Any
) -> InProcessGroup:
    """All plans have as many drafts as they may; `draw`: any number, drawn with this seed."""
    defaults = {"max_num_batched_tokens": 128, "check_agreement": True}
    group = InProcessGroup(folder, num_ranks, num_drafts=num_drafts, **{**defaults, **options})
    choices = draft_choices(num_drafts)
    drafting: Any = MostDrafts(choices) if draw is None else AnyDrafts(choices, draw)
    group.scheduler.composer.drafting = drafting
    return group


def accepted(group: InProcessGroup) -> tuple[int, int]:
    """Drafts, and how many of them were right, of all steps."""
    chances = group.scheduler.drafting.chances
    return sum(chances.num_drafts), sum(chances.num_accepted)


class Knowing:
    """A drafter that knows what each request gets. Three of four drafts are right, and some are missing."""

    reads_hidden = False

    def __init__(self, table: SlotTable, texts: list[list[int]]) -> None:
        self._state = table.state
        self._texts = texts

    def draft(self, slots: Tensor, num_drafts: int, computed: Computed | None, is_random: bool) -> None:
        state = self._state
        for slot in slots.tolist():
            known = state.history[slot, : int(state.position[slot]) + 1].tolist()
            count = min(num_drafts, int(state.most_drafts[slot]))
            text = next((text for text in self._texts if text[: len(known)] == known), known)
            drafts = text[len(known) : len(known) + count]
            for place in range(len(drafts)):
                chance = zlib.crc32(bytes([*known[-3:], place])) % 16
                if chance < 4:
                    drafts[place:] = [(drafts[place] + 1) % mix.VOCAB, *drafts[place + 1 :]] if chance else []
                    break
            state.drafts[slot, : len(drafts)] = torch.tensor(drafts, dtype=torch.int64)


Knows = Callable[[list[Submit], Mapping[int, list[int]]], None]


@pytest.fixture
def knows(monkeypatch: pytest.MonkeyPatch) -> Knows:
    """Has ranks make their drafts of the answers to these requests."""

    def use(submits: list[Submit], answers: Mapping[int, list[int]]) -> None:
        texts = [[*unpack_int32(submit.tokens), *answers[submit.request]] for submit in submits]
        monkeypatch.setattr(process, "make_drafter", lambda *parts: Knowing(parts[-1], texts))

    return use


@pytest.fixture(scope="module")
def answers(folder: Path) -> mix.Oracle:
    return mix.answers_alone(folder)


@pytest.fixture
def oracle(answers: mix.Oracle, knows: Knows) -> mix.Oracle:
    """What each request gets; drafts are made of it."""
    knows(mix.requests(), {number: tokens for number, (tokens, _) in answers.items()})
    return answers


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("lookahead", [0, 2, 4])
@pytest.mark.parametrize("num_drafts", [1, 3, 8])
def test_every_number_lookahead_and_tp_size(
    folder: Path, oracle: mix.Oracle, num_ranks: int, lookahead: int, num_drafts: int
) -> None:
    with group_with(folder, num_ranks, num_drafts, lookahead=lookahead) as group:
        group.run(mix.requests())
        mix.compare(group, oracle)
        drafts, right = accepted(group)
        assert right > 10, "drafts were right"
        assert drafts - right > 10, "and wrong"


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("seed", [1, 2])
def test_any_number_in_any_step(folder: Path, oracle: mix.Oracle, num_ranks: int, seed: int) -> None:
    with group_with(folder, num_ranks, 4, draw=seed, max_num_seqs=5) as group:
        group.run(mix.requests())
        mix.compare(group, oracle)
        assert {step.load.num_drafts for step in group.steps} == {0, 1, 2, 4}


@pytest.mark.parametrize(("num_ranks", "lookahead"), [(1, 0), (1, 2), (2, 2), (2, 4)])
def test_preemption(folder: Path, oracle: mix.Oracle, num_ranks: int, lookahead: int) -> None:
    with group_with(folder, num_ranks, 3, num_kv_blocks=20, lookahead=lookahead) as group:
        group.run(mix.requests())
        mix.compare(group, oracle)
        assert group.scheduler.composer.num_preemptions > 0
        assert accepted(group)[1] > 10


@pytest.mark.parametrize(("num_ranks", "num_drafts"), [(1, 1), (1, 4), (2, 3)])
def test_steps_padded_to_the_sizes_of_graphs(
    folder: Path, oracle: mix.Oracle, num_ranks: int, num_drafts: int
) -> None:
    options: dict[str, Any] = {"max_num_seqs": 7, "prepare": True, "check_agreement": False}
    with group_with(folder, num_ranks, num_drafts, draw=3, **options) as group:
        group.run(mix.requests())
        mix.compare(group, oracle)
        assert accepted(group)[1] > 10


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_random_delays_of_steps_and_copies(folder: Path, oracle: mix.Oracle, num_ranks: int) -> None:
    draw = random.Random(1)
    delay: Callable[[], float] = lambda: draw.choice([0, 0, 0.002, 0.01])  # noqa: E731
    with group_with(folder, num_ranks, 2, lookahead=3, jitter=delay, max_num_seqs=5) as group:
        group.run(mix.requests())
        mix.compare(group, oracle)


@pytest.mark.parametrize("max_model_len", [63, 64])
def test_any_length_is_prepared_for(folder: Path, max_model_len: int) -> None:
    """The longest step beforehand may be longer than a sequence, by what drafts have room for."""
    submit = next(submit for submit in mix.requests() if len(submit.tokens) < 4 * 20)
    answers = []
    for num_drafts in (0, 4):
        options: dict[str, Any] = {"max_model_len": max_model_len, "prepare": True, "check_agreement": False}
        with group_with(folder, 1, num_drafts, **options) as group:
            answers.append(group.run([submit])[submit.request].tokens)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("block_size", [1, 8])
@pytest.mark.parametrize("num_drafts", [1, 8])
def test_prompts_at_the_greatest_length(folder: Path, block_size: int, num_drafts: int) -> None:
    """One may fill it: its token, which is nobody's, has a place behind it; so have drafts near the end."""
    prompts = {number: [number, 7, 8] * 43 for number in range(1, 5)}
    lengths = {1: 128, 2: 127, 3: 126, 4: 120}
    submits = [
        Submit(0, number, pack_int32(prompt[: lengths[number]]), 0, sampling(temperature=0.0, max_tokens=20))
        for number, prompt in prompts.items()
    ]
    with InProcessGroup(folder, lookahead=0) as group:
        plain = {number: output.tokens for number, output in group.run(submits).items()}
    assert {number: len(tokens) for number, tokens in plain.items()} == {1: 1, 2: 1, 3: 2, 4: 8}
    options: dict[str, Any] = {"block_size": block_size, "num_kv_blocks": 1024}
    with group_with(folder, 1, num_drafts, **options) as group:
        got = {number: output.tokens for number, output in group.run(submits).items()}
        assert got == plain
        assert max(step.load.num_drafts for step in group.steps) == num_drafts


@pytest.mark.parametrize("options", [{}, {"prepare": True, "check_agreement": False}], ids=["", "graphs"])
@pytest.mark.parametrize("speculative_method", ["ngram", "mtp"])
def test_a_prompt_of_several_steps_alone(
    tmp_path: Path, speculative_method: str, options: dict[str, Any]
) -> None:
    """Steps with drafts that sample nobody, since the prompt does not end in them."""
    make_checkpoint(tmp_path, Qwen3Config(**BASE | {"vocab_size": mix.VOCAB}))
    prompt = pack_int32([3, 4, 5, 6] * 20)
    submit = Submit(0, 1, prompt, 0, sampling(max_tokens=6, num_logprobs=0, num_prompt_logprobs=0))
    with InProcessGroup(tmp_path, lookahead=0) as group:
        plain = group.run([submit])[1]
    options = {"max_num_batched_tokens": 16, "speculative_method": speculative_method, **options}
    with group_with(tmp_path, 1, 2, **options) as group:
        got = group.run([submit])[1]
        assert got.tokens == plain.tokens
        assert (len(got.logprobs), len(got.prompt_logprobs)) == (6, 79)
        assert max(step.load.num_drafts for step in group.steps if not step.num_decodes) == 2


# ------------------------------------------------------------------------------------ with features


@pytest.fixture(scope="module")
def answers_with_features(folder: Path) -> dict[int, Output]:
    return features.answers_alone(folder)


@pytest.fixture
def all_features(answers_with_features: dict[int, Output], knows: Knows) -> dict[int, Output]:
    submits = [*features.requests(), *features.barred_words(answers_with_features)]
    knows(submits, {number: output.tokens for number, output in answers_with_features.items()})
    return answers_with_features


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("num_drafts", [1, 4])
@pytest.mark.parametrize("case", ["prefix hits", "preemption", "captured sizes"])
def test_features_and_pairs(
    folder: Path, all_features: dict[int, Output], num_ranks: int, num_drafts: int, case: str
) -> None:
    options: dict[str, Any] = {
        "prefix hits": {},
        "preemption": {"num_kv_blocks": 26},
        "captured sizes": {"prepare": True, "max_num_seqs": 7, "check_agreement": False},
    }[case]
    with group_with(folder, num_ranks, num_drafts, **options) as group:
        group.send(features.VOCABULARY)
        group.run([*features.requests(), *features.barred_words(all_features)], timeout=180)
        features.compare(group, all_features)
        if case == "preemption":
            assert group.scheduler.composer.num_preemptions > 0
        assert accepted(group)[1] > 10
