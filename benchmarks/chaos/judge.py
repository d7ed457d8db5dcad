"""Whether a server has come through: its answers, and how long they paused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.chaos.faults import Fault
from benchmarks.chaos.load import Answer, Case
from benchmarks.common.report import quantile

SAME_LOGPROB = 1e-3
"""By which two logprobs of a token may differ in float32."""
NEAR_LOGPROB = 0.25
"""The same where what is computed again is rounded otherwise, as in bfloat16: without a fault, in batches of
other sizes, 0.11 was seen in 2,210 tokens of the default model."""
NEAR = "near"


def difference(case: Case, answer: Answer, right: Answer, is_exact: bool) -> str:
    """In what an answer differs; '': in nothing that matters. `NEAR`, only unless it is to be exact: another
    token was chosen where the model found both about as likely, and what follows is another text."""
    if answer.error:
        return f"error: {answer.error}"
    if answer.ends.keys() != right.ends.keys():
        return f"ends: {answer.ends} instead of {right.ends}"
    by_choice = [_choice(case, index, answer, right, is_exact) for index in sorted(right.ends)]
    wrong = [why for why in by_choice if why and why != NEAR]
    if wrong:
        return wrong[0]
    is_near = NEAR in by_choice
    for name in () if is_near and not case.has_fixed_length else ("ends", "usage"):
        if getattr(answer, name) != getattr(right, name):
            return f"{name}: {getattr(answer, name)!r} instead of {getattr(right, name)!r}"
    if answer.usage is None:
        return "there is no usage"
    return NEAR if is_near else ""


def _choice(case: Case, index: int, answer: Answer, right: Answer, is_exact: bool) -> str:
    """The same of one choice's text and logprobs."""
    tokens, others = answer.tokens.get(index, []), right.tokens.get(index, [])
    is_same = answer.texts.get(index) == right.texts.get(index) and len(tokens) == len(others)
    most = SAME_LOGPROB if is_exact else NEAR_LOGPROB
    for (token, logprob), (other, other_logprob) in zip(tokens, others, strict=False):
        if token != other and not is_exact:
            # A sampled token is one of many, and says nothing; those before it were as they should be.
            is_near = not case.is_greedy or abs(logprob - other_logprob) <= most
            return NEAR if is_near else f"{token!r} ({logprob}) instead of {other!r} ({other_logprob})"
        if abs(logprob - other_logprob) > most:
            return f"logprob of {token!r}: {logprob} instead of {other_logprob}"
    if not is_same:
        return f"text: {answer.texts.get(index)!r} instead of {right.texts.get(index)!r}"
    return ""


def wrong_answers(
    answers: Iterable[tuple[Case, bool, Answer]], right: dict[Case, Answer], is_exact: bool
) -> tuple[list[str], int]:
    """Of each that is not what it should be, in what; and how many are near, see `difference`."""
    found = [(case, difference(case, answer, right[case], is_exact)) for case, _, answer in answers]
    wrong = [f"{case.name}: {why}" for case, why in found if why not in ("", NEAR)]
    return wrong, sum(why == NEAR for _, why in found)


def pauses(answers: Iterable[tuple[Case, bool, Answer]], faults: Sequence[Fault]) -> list[float]:
    """Of each fault and each stream that was under way, the longest time without a chunk from there on."""
    found = []
    for _, is_streamed, answer in answers:
        if not is_streamed:
            continue
        gaps = list(zip(answer.chunks, answer.chunks[1:], strict=False))
        for fault in faults:
            here = [last - fault.time for first, last in gaps if first <= fault.time < last]
            found += here[:1]
    return found


@dataclass
class Verdict:
    """All of it."""

    seconds: float
    faults: dict[str, int]  # by kind and process
    restarts: int  # generations of processes
    num_answers: int
    num_left: int  # clients that hung up
    wrong: list[str]
    num_near: int
    leaks: list[str]
    pauses: dict[str, list[float]]  # of streams, by kind of fault
    growth: int  # bytes
    odd: list[str] = field(
        default_factory=list
    )  # recoveries without a reason, and what the server says wrongly
    recoveries: list[float] = field(default_factory=list)  # seconds, as the server has it
    left_behind: list[str] = field(default_factory=list)  # processes, after its end
    status: int | None = None

    @property
    def is_good(self) -> bool:
        """Whether nobody lost anything, and nothing is left."""
        return not (self.wrong or self.leaks or self.odd or self.left_behind or self.status)

    def as_json(self) -> dict[str, Any]:
        """For --json; times as quantiles."""
        values = asdict(self)
        values["pauses"] = {kind: quantiles(times) for kind, times in self.pauses.items()}
        values["recoveries"] = quantiles(self.recoveries)
        return {**values, "is_good": self.is_good}


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """How many, and the middle, the 99th percentile and the longest of them."""
    if not times:
        return {"count": 0}
    return {"count": len(times), **{f"p{round(100 * at)}": quantile(times, at) for at in (0.5, 0.99, 1.0)}}
