"""How many drafts the decoding slots of a plan get: the number with the most expected tokens a second.

    tokens a slot and step      1 + a1 + a1 a2 + …      ai: how often draft i is right where those before were
    ────────────────────── = ───────────────────────
     time of such a step      cost of so many drafts    against a plain step, by the size of the batch

Both are estimates of what was seen. What is not in use is tried now and then, for a few steps: texts change,
and so does what is right about them. Trials are paid for: each step earns a little, and a trial costs what it
is expected to lose. So all of them together cost less than a hundredth, however dear drafts are; but where
few decode, a request that is new has a trial of its own, some three plain steps where drafts are dear.

Costs are ratios. Contexts grow and requests come and go, so a step of now is compared with what the usual
kind takes now, never with a plain one of long ago. Steps with chunks of prompts tell of drafts, not of costs.

Nothing here draws random numbers or reads a clock: the same answers give the same choices.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

EARNED = 0.008
"""Of a step, that each step earns for trials at its size of the batch."""

SAVED_AT_FIRST, MOST_SAVED = 6.0, 12.0
"""Steps, at each size of the batch. What was earned in hours without need of trials is not spent at once."""

WAIT_STEPS = 24
"""Between trials, at least; doubled with each that has led to nothing, where drafts are in use already."""

WAIT_DOUBLINGS = 4

FEW_SLOTS, SAVED_ANEW = 4, 4.0
"""So many requests or fewer have so many steps for trials when one of them is new."""

MANY_DOUBLINGS, MANY_SLOTS = 3, 16
"""The same where none are in use, of so many slots or more, until a request is admitted."""

REMEASURE_STEPS = 512
"""After which the cost of fewer drafts than usual is measured again."""

BETTER = 1.01
"""So many times more tokens a second, or the usual number stays: estimates have noise."""

AS_GOOD = 1.005
"""So many times fewer, and fewer drafts are as good."""

CLOSE = 0.95
"""Of the usual number's tokens a second: what may in truth be better."""

FIRST_CHANCE = 0.3
"""That the first draft is right, before anything is known."""

NEXT_CHANCE = 0.7
"""That a draft behind a right one is: copies go on, and who guesses well guesses well again."""

HOPED_CHANCE = 0.9
"""For what is worth a trial: of drafts of which nothing is known."""

GUESSED_COST = 0.04
"""Of each draft, before anything is measured."""

FADED = 0.25
"""What counts of evidence from before a trial: it is of a text long gone."""

SHORTEST_MEMORY, LONGEST_MEMORY, WORTH_WAITING = 16, 160, 8.0
"""Steps that an estimate of chances looks back on: the more, the less it costs to be wrong. Where one request
decodes and drafts cost little, n-grams may find nothing for a while, then copy a page; many have a mean."""

NUM_TIMES, SETTLED = 15, 3
"""Times that a cost is the median of, at most, and how many are enough to compare others with."""


class Chances:
    """How often drafts are right, by their position."""

    def __init__(self, num_positions: int) -> None:
        self.num_drafts = [0] * num_positions
        """Drafts that there were, since the start."""
        self.num_accepted = [0] * num_positions
        """Of these, how many were taken."""
        self._trials = [0.0] * num_positions  # slots whose drafts before this position were right; lately
        self._hits = [0.0] * num_positions

    def count(self, proposed: Sequence[int], counts: Sequence[int]) -> None:
        """Of a step: for each slot, how many drafts it had and how many tokens it got."""
        for number, slots in Counter(proposed).items():
            for position in range(number):
                self.num_drafts[position] += slots
        for number, slots in Counter(counts).items():
            for position in range(number - 1):
                self.num_accepted[position] += slots

    def learn(self, counts: Sequence[int], num_positions: int, memory: float) -> None:
        """Takes a step as evidence of its first positions, those for which drafts were looked for at all.

        A slot without a draft counts as one whose draft was wrong: that is what it comes to.
        """
        tally = Counter(counts)
        reached = len(counts) - tally[0]  # those without a token had come to their ends
        for position in range(num_positions):
            right = sum(slots for number, slots in tally.items() if number > position + 1)
            if reached:
                self._trials[position] += reached - self._trials[position] / memory
                self._hits[position] += right - self._hits[position] / memory
            reached = right

    def fade(self) -> None:
        """What is known counts less from now on."""
        self._trials = [FADED * trials for trials in self._trials]
        self._hits = [FADED * hits for hits in self._hits]

    def tokens(self, num_drafts: int) -> float:
        """Expected of a slot in a step with so many drafts."""
        chance, reach, tokens = FIRST_CHANCE, 1.0, 1.0
        for hits, trials in zip(self._hits[:num_drafts], self._trials[:num_drafts], strict=True):
            chance = (hits + chance) / (trials + 1.0)
            reach *= chance
            tokens += reach
            chance = NEXT_CHANCE
        return tokens

    def hoped_tokens(self, num_drafts: int) -> float:
        """The same at best: as if drafts of which little is known were mostly right."""
        reach, tokens = 1.0, 1.0
        for hits, trials in zip(self._hits[:num_drafts], self._trials[:num_drafts], strict=True):
            reach *= (hits + HOPED_CHANCE) / (trials + 1.0)
            tokens += reach
        return tokens


@dataclass(slots=True)
class Costs:
    """What steps cost at one size of the batch, against a plain one, by their number of drafts."""

    usual: int = 0
    """The number of drafts that is in use."""
    saved: float = SAVED_AT_FIRST
    """What may be spent on trials, in steps."""
    num_steps: int = 0
    num_failed: int = 0
    """Trials since the usual number last changed."""
    last_trial: int = 0  # in steps of this size
    tried: dict[int, int] = field(default_factory=dict)
    """When a number of drafts was last tried, in steps of this size."""
    _plain: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_TIMES))
    _samples: dict[int, deque[float]] = field(default_factory=dict)
    _ratios: dict[int, float] = field(default_factory=dict)  # their medians

    def add(self, num_drafts: int, seconds: float, guessed: float) -> None:
        """A step took so long; `guessed`: what its cost is taken to be so far.

        Steps of the usual kind say what a plain one would take now, others what theirs cost against that.
        """
        if num_drafts == self.usual:
            self._ratios.setdefault(num_drafts, guessed)  # and stays the same while it is
            self._plain.append(seconds / guessed)
        elif len(self._plain) >= SETTLED:
            samples = self._samples.setdefault(num_drafts, deque(maxlen=NUM_TIMES))
            samples.append(seconds / median(self._plain))
            self._ratios[num_drafts] = median(samples)

    def ratio(self, num_drafts: int) -> float | None:
        """The cost: measured, or in proportion to what fewer drafts cost more than none; None: not known."""
        if num_drafts in self._ratios:
            return self._ratios[num_drafts]
        fewer = max((other for other in self._ratios if other < num_drafts), default=0)
        if not fewer:
            return None
        plain = self._ratios.get(0, 1.0)
        return plain + (self._ratios[fewer] - plain) * num_drafts / fewer

    def is_settled(self) -> bool:
        """Whether trials have something to be compared with; or never will, with chunks in every step."""
        return len(self._plain) >= SETTLED or self.num_steps >= 10 * SETTLED


class Drafting:
    """Chooses numbers of drafts, and learns from what came of them.

    Args:
        choices: numbers of drafts a slot, ascending, 0 first.
    """

    def __init__(self, choices: tuple[int, ...]) -> None:
        assert choices[0] == 0
        assert list(choices) == sorted(set(choices))
        self.chances = Chances(choices[-1])
        self.choices = choices
        self._costs: dict[int, Costs] = {}  # by size of the batch, in powers of two
        self._trial = 0
        self._trial_steps = 0  # of the trial, that are still to be planned
        self._last_num_drafts = 0  # of the step that was answered last

    # ------------------------------------------------------------------------------------ learn

    def answered(
        self,
        num_drafts: int,
        num_decodes: int,
        num_prefill_tokens: int,
        seconds: float,
        proposed: Sequence[int],
        counts: Sequence[int],
    ) -> None:
        """A step has come back; steps come in their order.

        Args:
            num_drafts: of its plan.
            num_decodes: slots that decoded in it.
            num_prefill_tokens: of its chunks.
            seconds: that the device took for it.
            proposed: of each decoding slot that tells something, how many drafts it had; may be empty where
                `num_drafts` is 0.
            counts: of each of these, how many tokens it got.
        """
        made = min(num_drafts, self._last_num_drafts)  # drafts are made by the step before, as many as it had
        self._last_num_drafts = num_drafts
        if not num_decodes:
            return
        size = _size(num_decodes)
        if num_drafts:
            self.chances.count(proposed, counts)
            self.chances.learn(counts, made, self._memory(num_decodes, num_drafts))
        if not num_prefill_tokens and seconds > 0:
            self._at(size).add(num_drafts, seconds, self._ratio(size, num_drafts))

    def _memory(self, num_decodes: int, num_drafts: int) -> float:
        size = _size(num_decodes)
        extra = self._ratio(size, num_drafts) / self._ratio(size, 0) - 1.0
        return max(min(WORTH_WAITING / max(extra, 1e-3), LONGEST_MEMORY) / num_decodes, SHORTEST_MEMORY)

    # ----------------------------------------------------------------------------------- choose

    def choose(self, num_sampled: int, most: int) -> int:
        """The number of drafts for the next plan, of the choices, and at most `most`.

        Args:
            num_sampled: slots that will decode in it.
        """
        allowed = [choice for choice in self.choices if choice <= most]
        if num_sampled < 1 or len(allowed) < 2:
            return 0
        size = _size(num_sampled)
        costs = self._at(size)
        costs.num_steps += 1
        costs.saved = min(costs.saved + EARNED, MOST_SAVED)
        if self._trial_steps and self._trial in allowed:
            self._trial_steps -= 1
            return self._trial
        self._trial_steps = 0
        self._settle(size, costs, allowed)
        trial = self._due(size, costs, allowed, num_sampled)
        if trial is None:
            return costs.usual
        self._begin(costs, trial, num_sampled)
        return trial

    def renew(self) -> None:
        """A request has got a slot: what has failed with other texts may be right of its.

        Of few requests it is a large part, and is given what a trial may cost, however dear.
        """
        for size, costs in self._costs.items():
            costs.num_failed = 0
            if size <= _size(FEW_SLOTS):
                costs.saved = max(costs.saved, SAVED_ANEW)

    def _settle(self, size: int, costs: Costs, allowed: list[int]) -> None:
        """Which number is the usual one from now on."""
        if costs.usual not in allowed:
            costs.usual = allowed[-1]
        known = [choice for choice in allowed if choice == 0 or self._is_known(choice)]
        rates = {choice: self._rate(size, choice) for choice in {*known, costs.usual}}
        best = max(known, key=rates.__getitem__)
        if rates[best] < BETTER * rates[costs.usual]:
            best = next(choice for choice in sorted(rates) if rates[choice] * AS_GOOD >= rates[costs.usual])
        if best != costs.usual:
            costs.tried[costs.usual] = costs.num_steps
            costs.usual = best
            costs.num_failed = 0

    def _due(self, size: int, costs: Costs, allowed: list[int], num_sampled: int) -> int | None:
        """What is to be tried now; None: nothing."""
        if not costs.is_settled():
            return None
        usual, since = costs.usual, costs.num_steps - costs.last_trial
        below = [choice for choice in allowed if choice < usual]
        above = [choice for choice in allowed if choice > usual and self._is_worth(size, costs, choice)]
        due = [choice for choice in [*above, *below] if choice not in costs.tried]
        # Where there are none in use, what many texts have said together holds for a while.
        doublings = WAIT_DOUBLINGS if usual else MANY_DOUBLINGS * (num_sampled >= MANY_SLOTS)
        wait = WAIT_STEPS << min(costs.num_failed, doublings)
        due += [choice for choice in below if self._is_doubtful(size, costs, choice, wait)]
        if since >= wait:
            due += self._cheap(size, costs, above, num_sampled)
        for choice in due:
            price = self._price(size, costs, choice, num_sampled)
            if costs.saved >= price:
                costs.saved -= price
                return choice
        return None

    def _is_doubtful(self, size: int, costs: Costs, choice: int, wait: int) -> bool:
        """Whether the cost of fewer drafts than usual is to be measured again: soon, if it is close."""
        since = costs.num_steps - costs.tried.get(choice, 0)
        is_close = self._rate(size, choice) > CLOSE * self._rate(size, costs.usual)
        return since >= (wait if is_close else REMEASURE_STEPS)

    def _cheap(self, size: int, costs: Costs, above: list[int], num_sampled: int) -> list[int]:
        """Of more drafts than usual: the most that cost little more to try than the fewest, and tell more."""
        prices = [self._price(size, costs, choice, num_sampled) for choice in above]
        return [choice for choice, price in zip(above, prices, strict=True) if price <= 2 * prices[0]][-1:]

    def _is_worth(self, size: int, costs: Costs, choice: int) -> bool:
        """Whether more drafts than usual could be better, at best.

        Where none are in use that can change with any text, so the fewest always are.
        """
        if costs.usual == 0 and choice == self.choices[1]:
            return True
        return self.chances.hoped_tokens(choice) / self._cost(size, choice) > self._rate(size, costs.usual)

    def _price(self, size: int, costs: Costs, choice: int, num_sampled: int) -> float:
        """What a trial is expected to lose, in steps: where no drafts are in use, as if none were right."""
        steps, usual = _trial_steps(num_sampled), costs.usual
        gain = self.chances.tokens(choice) / self.chances.tokens(usual) if usual else 1.0
        lost = max(self._cost(size, choice) / self._cost(size, usual) - gain, 0.0)
        back = max(1.0 - gain, 0.0)  # its last step makes fewer drafts than the next one has places for
        return (steps + (choice > usual)) * lost + back + 0.01

    def _begin(self, costs: Costs, trial: int, num_sampled: int) -> None:
        """A trial. Its first step has no more drafts than usual: they are made at the end of it."""
        self._trial = trial
        self._trial_steps = _trial_steps(num_sampled) - (trial < costs.usual)
        if costs.usual == 0:  # else the drafts in use have told whether the text is another
            self.chances.fade()
        costs.last_trial = costs.tried[trial] = costs.num_steps
        costs.num_failed += 1

    # -------------------------------------------------------------------------------- estimates

    def _at(self, size: int) -> Costs:
        if size not in self._costs:
            near = [self._costs[other].usual for other in self._nearest(size)]
            self._costs[size] = Costs(usual=near[0] if near else 0)
        return self._costs[size]

    def _nearest(self, size: int) -> list[int]:
        return sorted(self._costs, key=lambda other: abs(other - size))

    def _is_known(self, choice: int) -> bool:
        return any(choice in costs.tried for costs in self._costs.values())

    def _rate(self, size: int, choice: int) -> float:
        """Expected tokens of a slot in the time of a plain step."""
        return self.chances.tokens(choice) / self._cost(size, choice)

    def _cost(self, size: int, choice: int) -> float:
        """As `_ratio`, and not less than that of fewer drafts: what was measured has noise."""
        return max(self._ratio(size, fewer) for fewer in self.choices if fewer <= choice)

    def _ratio(self, size: int, choice: int) -> float:
        """Cost of a step against a plain one: as known at this size, or at the nearest, or a guess."""
        own = self._costs.get(size)
        ratio = own.ratio(choice) if own else None
        near = iter(self._nearest(size) if ratio is None else [])
        while ratio is None and (other := next(near, None)) is not None:
            ratio = self._costs[other].ratio(choice)
        return 1.0 + GUESSED_COST * choice if ratio is None else ratio


def _size(num_decodes: int) -> int:
    return (num_decodes - 1).bit_length()


def _trial_steps(num_sampled: int) -> int:
    """Steps of a trial that tell something: of six slots, all steps together, and of two times."""
    return max(2, -(-6 // num_sampled))
