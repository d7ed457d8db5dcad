"""Sizes are agreed on before anything is allocated: every rank offers KV blocks, and all get the fewest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from tpworker.ipc.channels import Channel, Poller
from tpworker.ipc.messages import Allocate, RankLoaded, RankReady
from tpworker.ipc.patience import Patience
from tpworker.ipc.wire import expect

_M = TypeVar("_M")


class Offer(NamedTuple):
    """Of all ranks together."""

    num_kv_blocks: int
    are_kept: bool
    """Whether every rank has just so many from an earlier generation, with what was in them."""

    @classmethod
    def of(cls, loaded: Sequence[RankLoaded]) -> Offer:
        """What the ranks' offers come to."""
        fewest = min(offer.max_kv_blocks for offer in loaded)
        return cls(fewest, all(offer.has_kept and offer.max_kv_blocks == fewest for offer in loaded))


def take_offers(plans: list[Channel], ranks: list[str], timeout: float) -> Offer:
    """Waits for the offer of every rank.

    Raises:
        TimeoutError: names the ranks that did not answer within `timeout` seconds.
    """
    return Offer.of(gather(plans, ranks, RankLoaded, timeout))


def allocate(
    plans: list[Channel], ranks: list[str], generation: int, num_kv_blocks: int, timeout: float
) -> None:
    """Tells all ranks how many it is, and waits until they have them.

    Raises:
        TimeoutError: names the ranks that did not answer within `timeout` seconds.
    """
    for channel in plans:
        channel.send(Allocate(generation, num_kv_blocks))
    gather(plans, ranks, RankReady, timeout)


def gather(channels: list[Channel], ranks: list[str], kind: type[_M], timeout: float) -> list[_M]:
    """One message of a kind from every rank."""
    patience = Patience(timeout)
    answers: dict[Channel, _M] = {}
    while len(answers) < len(channels):
        waiting = [channel for channel in channels if channel not in answers]
        ready = Poller(waiting).wait(patience.slice())
        if not ready and not patience.left():
            late = [name for channel, name in zip(channels, ranks, strict=True) if channel in waiting]
            raise TimeoutError(f"{', '.join(late)}: no {kind.__name__} within {timeout:g} s (start_timeout)")
        for channel in ready:
            message = channel.receive_now()
            if message is not None:
                answers[channel] = expect(message, kind)
    return [answers[channel] for channel in channels]
