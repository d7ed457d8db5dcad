"""One request on replicas that are lost whenever it is bad: its client gets each token, once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpworker import InvalidRequest, QueueFull, RequestOutput, RuntimeFailed, SamplingParams
from tpworker.integrations import relay
from tpworker.integrations.relay import Ask, Open, Outputs, Relay, ReplicaLost

LENGTH = 12


def token(seed: int | None, position: int) -> int:
    """What a model says: of seed and position alone."""
    return hash((seed, position)) % 1000


def tokens_of(sampling: SamplingParams) -> dict[int, list[int]]:
    """The outputs without a fault, by choice. They end at different lengths."""
    seeds = [sampling.of_choice(index).seed for index in range(sampling.n)]
    lengths = [LENGTH - token(seed, -1) % 5 for seed in seeds]
    return {
        index: [token(seed, at) for at in range(length)]
        for index, (seed, length) in enumerate(zip(seeds, lengths, strict=True))
    }


class Replicas:
    """Answers, and is lost after so many outputs, one number a replica; then it lasts."""

    def __init__(self, lives: Iterator[int | Exception]) -> None:
        self._lives = lives
        self.asked: list[Ask] = []

    async def open(self, ask: Ask) -> Outputs:
        self.asked.append(ask)
        life = next(self._lives, 10_000)
        if isinstance(life, Exception):
            raise life
        whole = tokens_of(ask.sampling)
        left = {index: tokens[len(ask.delivered) :] for index, tokens in whole.items()}
        if ask.delivered:
            assert ask.sampling.n == 1
            assert whole[0][: len(ask.delivered)] == list(ask.delivered)
        made = 0
        while left:
            for index in tuple(left):
                await asyncio.sleep(0)
                if life == made:
                    raise ReplicaLost("it is dead")
                made += 1
                new, left[index] = left[index][:2], left[index][2:]
                reason = None if left[index] else "length"
                if reason:
                    del left[index]
                so_far = len(whole[index]) - len(left.get(index, ()))
                yield RequestOutput(
                    "", "", tuple(new), reason, None, 3, 7 * len(self.asked), so_far, index,  # type: ignore[arg-type]
                    num_draft_tokens=made,
                )  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "AGAIN_SECONDS", 0.0)


def ask(**params: Any) -> Ask:
    return Ask((1, 2, 3), SamplingParams(max_tokens=LENGTH, seed=5, **params))


def run(open_one: Open, asked: Ask) -> tuple[dict[int, list[RequestOutput]], Relay]:
    the_relay = Relay(open_one)

    async def main() -> dict[int, list[RequestOutput]]:
        found: dict[int, list[RequestOutput]] = {}
        async for output in the_relay.outputs(asked):
            found.setdefault(output.index, []).append(output)
        return found

    return asyncio.run(asyncio.wait_for(main(), 30)), the_relay


@given(st.integers(1, 4), st.lists(st.integers(1, 9), max_size=12))
def test_wherever_replicas_are_lost_each_choice_gets_its_tokens_once(n: int, lives: list[int]) -> None:
    asked = ask(n=n, prompt_logprobs=2)
    replicas = Replicas(iter(lives))
    found, the_relay = run(replicas.open, asked)
    whole = tokens_of(asked.sampling)
    for index, outputs in found.items():
        assert [i for output in outputs for i in output.token_ids] == whole.pop(index)
        counted = [output.num_output_tokens for output in outputs]
        assert counted == sorted(set(counted))
        assert [output.finish_reason for output in outputs] == [None] * (len(outputs) - 1) + ["length"]
        drafts = [output.num_draft_tokens for output in outputs]
        assert drafts == sorted(drafts), "they are counted on"
        assert len({output.num_cached_tokens for output in outputs}) == 1, "the first replica's count holds"
    assert not whole
    assert the_relay.num_moves == len(replicas.asked) - 1
    of_first = asked.sampling.of_choice(0).seed
    for rest in replicas.asked[1:]:
        told = 2 if n == 1 or rest.sampling.seed == of_first else None
        assert rest.sampling.prompt_logprobs == told


def test_what_ends_every_replica_is_given_up() -> None:
    replicas = Replicas(iter([0] * 9))
    with pytest.raises(RuntimeFailed, match=r"3 replicas in a row were lost .* it is dead"):
        run(replicas.open, ask())
    assert len(replicas.asked) == 3
    further = Replicas(iter([1, 0, 1, 0, 1, 0, 1]))
    found, _ = run(further.open, ask())
    assert len(found[0]) >= 4, "whoever comes further has not ended them"


def test_replicas_that_take_nothing_are_not_held_against_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = [ReplicaLost("it has failed", was_taken=False) for _ in range(9)]
    found, the_relay = run(Replicas(iter([1, *absent])).open, ask())
    assert found[0][-1].finish_reason == "length"
    assert the_relay.num_moves == 1
    monkeypatch.setattr(relay, "MOST_SECONDS", 0.0)
    with pytest.raises(RuntimeFailed, match=r"no replica took this request for 0 s .* it has failed"):
        run(Replicas(iter(absent * 999)).open, ask())


def test_a_full_queue_refuses_what_comes_and_not_what_has_begun() -> None:
    full: Callable[[], Exception] = lambda: QueueFull("full")  # noqa: E731
    with pytest.raises(QueueFull):
        run(Replicas(iter([full()])).open, ask())
    replicas = Replicas(iter([2, full(), full()]))
    found, the_relay = run(replicas.open, ask())
    assert [i for output in found[0] for i in output.token_ids] == tokens_of(ask().sampling)[0]
    assert (len(replicas.asked), the_relay.num_moves) == (4, 1)


def test_the_first_error_of_a_choice_ends_all() -> None:
    """However long the others would take."""
    asked = ask(n=3)
    replicas = Replicas(iter([2]))

    async def open_one(rest: Ask) -> Outputs:
        if rest.sampling.seed == asked.sampling.of_choice(1).seed:
            raise InvalidRequest("no", "n")
        if rest.delivered:
            await asyncio.sleep(3600)
        async for output in replicas.open(rest):
            yield output

    with pytest.raises(InvalidRequest, match="no"):
        run(open_one, asked)


def test_a_consumer_that_leaves_closes_what_it_was_answered_by() -> None:
    closed: list[int] = []

    async def open_one(asked: Ask) -> Outputs:
        try:
            async for output in Replicas(iter(())).open(asked):
                yield output
                if not closed and not asked.delivered:
                    raise ReplicaLost("gone")
                await asyncio.sleep(3600)
        finally:
            closed.append(len(asked.delivered))

    async def main() -> None:
        outputs = Relay(open_one).outputs(ask(n=2))
        before = len(asyncio.all_tasks())
        for _ in range(2):
            await anext(outputs)
        await outputs.aclose()
        assert len(asyncio.all_tasks()) == before

    asyncio.run(asyncio.wait_for(main(), 30))
    assert len(closed) == 3
