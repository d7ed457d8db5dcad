"""How many drafts a plan gets, in worlds that are simulated: what is right, and what steps take."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from tpworker.scheduler.drafting import Drafting

LOOKAHEAD = 2
CHOICES = 0, 1, 2, 4


@dataclass
class World:
    """Steps with noisy times; a draft is right with a chance, as long as those before it were.

    Args:
        chance: of a draft being right, by step and position from 1.
        cost: of a step with n decoding slots and d drafts, against a plain one.
        num_decodes: slots that decode, by step.
    """

    chance: Callable[[int, int], float]
    cost: Callable[[int, int], float]
    num_decodes: Callable[[int], int] = lambda step: 1
    choices: tuple[int, ...] = CHOICES
    num_prefill_tokens: Callable[[int], int] = lambda step: 0
    plain_seconds: Callable[[int], float] = lambda step: 0.01
    noise: float = 0.03
    seed: int = 0
    most: int = 8
    is_new: Callable[[int], bool] = lambda step: False  # a request is admitted
    chosen: list[int] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)  # of a slot
    costs: list[float] = field(default_factory=list)

    def run(self, num_steps: int) -> Drafting:
        """Plans and answers, as many plans ahead as the lookahead is."""
        rng, drafting, made = random.Random(self.seed), Drafting(self.choices), 0
        waiting = []
        for step in range(num_steps):
            slots = self.num_decodes(step)
            if self.is_new(step):
                drafting.renew()
            drafts = drafting.choose(slots, self.most)
            had = min(made, drafts)  # drafts are made at the end of the step before
            made = drafts
            counts = [self._count(rng, step, had) for _ in range(slots)]
            cost = self.cost(slots, drafts)
            seconds = self.plain_seconds(step) * cost * (1 + self.noise * rng.gauss(0, 1))
            seconds *= 4 if rng.random() < 0.003 else 1  # somebody else was at it
            prefill = self.num_prefill_tokens(step)
            waiting.append((drafts, slots, prefill, seconds + prefill * 1e-4, [had] * slots, counts))
            if len(waiting) > LOOKAHEAD:
                drafting.answered(*waiting.pop(0))
            self.chosen.append(drafts)
            self.tokens.append(sum(counts) / slots)
            self.costs.append(cost)
        return drafting

    def _count(self, rng: random.Random, step: int, had: int) -> int:
        count = 1
        while count <= had and rng.random() < self.chance(step, count):
            count += 1
        return count

    def rate(self, first: int = 0, end: int | None = None) -> float:
        """Tokens of a slot in the time of a plain step, of some of the steps."""
        return sum(self.tokens[first:end]) / sum(self.costs[first:end])


def each(extra: float) -> Callable[[int, int], float]:
    """The same extra cost for each draft."""
    return lambda slots, drafts: 1 + extra * drafts


def best_rate(chance: float, extra: float, choices: tuple[int, ...] = CHOICES) -> float:
    """Of somebody who knows the world."""
    return max(sum(chance**i for i in range(d + 1)) / (1 + extra * d) for d in choices)


@pytest.mark.parametrize("slots", [1, 4, 16, 64])
@pytest.mark.parametrize("extra", [0.01, 0.05, 0.1, 0.4])
@pytest.mark.parametrize("choices", [(0, 1), CHOICES, (0, 1, 2, 4, 8)])
def test_where_nothing_is_right_little_is_lost(slots: int, extra: float, choices: tuple[int, ...]) -> None:
    world = World(lambda step, position: 0.0, each(extra), lambda step: slots, choices)
    world.run(2000)
    assert world.rate() > 1 / 1.025  # what is learnt first included, where it is dear
    assert world.rate(500) > 1 / 1.02


@pytest.mark.parametrize("slots", [1, 16, 64])
@pytest.mark.parametrize("extra", [0.02, 0.05, 0.3])
@pytest.mark.parametrize("noise", [0.1, 0.2])
def test_noise_does_not_look_like_a_gain(slots: int, extra: float, noise: float) -> None:
    """No drafts that cost nothing: a step with more of them cannot be the shorter one."""
    world = World(lambda step, position: 0.0, each(extra), lambda step: slots, noise=noise)
    world.run(2500)
    assert world.rate(500) > 1 / 1.025


@pytest.mark.parametrize("slots", [1, 4, 16, 64])
@pytest.mark.parametrize("choices", [(0, 1), CHOICES])
def test_where_most_are_right_nearly_all_is_gained(slots: int, choices: tuple[int, ...]) -> None:
    world = World(lambda step, position: 0.9, each(0.1), lambda step: slots, choices)
    world.run(2000)
    assert world.rate() > 0.97 * best_rate(0.9, 0.1, choices)
    assert world.rate(500) > 0.985 * best_rate(0.9, 0.1, choices)


@pytest.mark.parametrize(("chance", "extra"), [(0.6, 0.05), (0.6, 0.2), (0.3, 0.1), (0.3, 0.4), (0.8, 0.4)])
@pytest.mark.parametrize("slots", [1, 8, 64])
def test_in_between_it_is_near_the_best(slots: int, chance: float, extra: float) -> None:
    world = World(lambda step, position: chance, each(extra), lambda step: slots)
    world.run(3000)
    assert world.rate(300) > 0.95 * best_rate(chance, extra)


@pytest.mark.parametrize("slots", [1, 4, 64])
def test_another_text_is_noticed(slots: int) -> None:
    def chance(step: int, position: int) -> float:
        return 0.9 if step // 500 % 2 else 0.0

    world = World(chance, each(0.1), lambda step: slots)
    world.run(4000)
    for phase in range(1, 8):
        first = 500 * phase
        if phase % 2:
            assert world.rate(first + 120, first + 500) > 0.93 * best_rate(0.9, 0.1), "drafts are right again"
        else:
            assert world.rate(first + 100, first + 500) > 1 / 1.03, "nothing is right any more"


def test_deep_drafts_are_given_up_where_only_the_first_is_right() -> None:
    world = World(lambda step, position: 0.9 if position == 1 else 0.1, each(0.1), lambda step: 4)
    world.run(1000)
    assert set(world.chosen[300:]) <= {0, 1, 2, 4}
    assert world.chosen[300:].count(1) > 600


@pytest.mark.parametrize(("extra", "least"), [(0.01, 1.23), (0.03, 1.1)])  # 1.27, 1.18: four drafts always
def test_copies_that_come_now_and_then_are_waited_for_where_it_costs_little(
    extra: float, least: float
) -> None:
    world = World(lambda step, position: 0.95 if step % 110 < 10 else 0.0, each(extra))
    world.run(4000)
    assert world.rate(1000) > least


def test_each_size_of_the_batch_has_its_costs() -> None:
    world = World(
        lambda step, position: 0.7,
        lambda slots, drafts: 1 + (0.01 if slots <= 4 else 1.0) * drafts,
        lambda step: 2 if step // 200 % 2 else 64,
    )
    world.run(4000)
    few = [drafts for step, drafts in enumerate(world.chosen) if step > 1000 and step // 200 % 2]
    many = [drafts for step, drafts in enumerate(world.chosen) if step > 1000 and not step // 200 % 2]
    assert few.count(4) > 0.9 * len(few)
    assert many.count(0) > 0.9 * len(many)


@pytest.mark.parametrize("chance", [0.0, 0.9])
def test_costs_are_compared_with_what_steps_take_now(chance: float) -> None:
    """Contexts grow, so each step takes longer than those before: that is nobody's fault."""
    world = World(
        lambda step, position: chance,
        each(0.15),
        lambda step: 4,
        plain_seconds=lambda step: 0.01 * (1 + step % 1000 / 200),
    )
    world.run(4000)
    assert world.rate(500) > 0.97 * best_rate(chance, 0.15)


@pytest.mark.parametrize(("chance", "least"), [(0.0, 1 / 1.03), (0.9, 0.9 * 2.9)])
@pytest.mark.parametrize("period", [1, 3])
def test_steps_with_chunks_do_not_count_as_dear_ones(chance: float, least: float, period: int) -> None:
    world = World(
        lambda step, position: chance,
        each(0.1),
        lambda step: 16,
        num_prefill_tokens=lambda step: 0 if step % period else step % 7 * 300 + 1,
    )
    world.run(3000)
    assert world.rate(500) > least


def test_there_are_never_more_than_may_be() -> None:
    world = World(lambda step, position: 1.0, each(0.0), most=3)
    world.run(500)
    assert max(world.chosen) == 2
    drafting = Drafting(CHOICES)
    assert [drafting.choose(1, 0) for _ in range(100)] == [0] * 100
    assert [Drafting((0,)).choose(1, 8), drafting.choose(0, 8)] == [0, 0]


def test_a_limit_that_comes_in_the_middle_holds_at_once() -> None:
    drafting = World(lambda step, position: 0.95, each(0.02)).run(1000)
    assert drafting.choose(1, 8) == 4
    assert drafting.choose(1, 3) <= 3
    assert drafting.choose(1, 0) == 0


def test_the_same_answers_give_the_same_choices() -> None:
    worlds = [World(lambda step, position: 0.5, each(0.1), lambda step: 1 + step // 50 % 9) for _ in range(2)]
    for world in worlds:
        world.run(1000)
    assert worlds[0].chosen == worlds[1].chosen
    assert len(set(worlds[0].chosen)) > 2


def test_a_first_step_without_drafts_is_no_evidence() -> None:
    """Drafts are made at the end of a step that has some: the first of these has none."""
    drafting = Drafting((0, 1))
    drafting.answered(0, 4, 0, 0.01, [], [1] * 4)
    before = drafting.chances.tokens(1)
    drafting.answered(1, 4, 0, 0.01, [0] * 4, [1] * 4)
    assert drafting.chances.tokens(1) == before
    drafting.answered(1, 4, 0, 0.01, [0] * 4, [1] * 4)  # now there might have been some
    assert drafting.chances.tokens(1) < before


def test_slots_at_their_ends_are_no_evidence() -> None:
    drafting = Drafting((0, 1))
    for _ in range(2):
        drafting.answered(1, 2, 0, 0.01, [1, 1], [0, 0])
    assert drafting.chances.tokens(1) == Drafting((0, 1)).chances.tokens(1)


def test_drafts_are_counted_by_position() -> None:
    drafting = Drafting(CHOICES)
    drafting.answered(0, 3, 0, 0.01, [], [1, 1, 1])
    assert drafting.chances.num_drafts == drafting.chances.num_accepted == [0, 0, 0, 0]
    drafting.answered(4, 4, 0, 0.01, [4, 2, 0, 3], [5, 2, 1, 0])
    drafting.answered(2, 1, 7, 0.01, [2], [2])
    assert drafting.chances.num_drafts == [4, 4, 2, 1]
    assert drafting.chances.num_accepted == [3, 1, 1, 1]


def test_a_step_of_no_time_and_one_of_no_slots_are_taken() -> None:
    drafting = Drafting(CHOICES)
    for _ in range(100):
        drafting.answered(drafting.choose(2, 8), 2, 0, 0.0, [0, 0], [1, 1])
        drafting.answered(0, 0, 50, 0.01, [], [])


@pytest.mark.parametrize(("slots", "extra"), [(1, 0.5), (4, 0.5), (16, 0.05), (64, 0.15)])
def test_other_requests_are_other_texts(slots: int, extra: float) -> None:
    """By turns 200 steps of which nothing is right, and 200 of which most is: each batch of new requests."""
    world = World(
        lambda step, position: 0.9 * (step // 200 % 2), each(extra), lambda step: slots, (0, 1),
        is_new=lambda step: step % 200 == 0,
    )  # fmt: skip
    world.run(2000)
    for first in range(400, 2000, 400):
        assert world.rate(first, first + 200) > 1 / 1.1
        assert world.rate(first + 200, first + 400) > 0.93 * best_rate(0.9, extra, (0, 1))


@pytest.mark.parametrize(
    ("slots", "extra", "lost"), [(1, 0.5, 0.03), (4, 0.5, 0.04), (16, 0.1, 0.01), (64, 0.15, 0.01)]
)
def test_new_requests_of_which_nothing_is_right_cost_little(slots: int, extra: float, lost: float) -> None:
    """One every 200 steps where few decode, one in every step where many do."""
    every = 200 if slots <= 4 else 1
    world = World(lambda step, position: 0.0, each(extra), lambda step: slots, (0, 1))
    world.is_new = lambda step: step % every == 0
    world.run(4000)
    assert world.rate(400) > 1 - lost
