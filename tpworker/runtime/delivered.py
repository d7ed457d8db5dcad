"""What a client has of an output already, from a runtime that it began on: another one goes on behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tpworker.errors import InvalidRequest, shown
from tpworker.ipc.arrays import unpack_int32
from tpworker.ipc.messages import Sampling
from tpworker.runtime.requests import Request
from tpworker.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tpworker.model.families import ModelSpec


def check_delivered(
    delivered: Sequence[int], params: SamplingParams, sampling: Sampling, spec: ModelSpec
) -> tuple[int, ...]:
    """The token ids of an output that is to go on, which can have any that it could have got.

    Args:
        delivered: token ids; an array or a tensor of them, too.
        params: what the request asks for.
        sampling: the same with every default filled in.
        spec: of the model.

    Raises:
        InvalidRequest: they are no tokens of the model, of which output they are is not clear, or nothing
            comes behind them.
    """
    if not len(delivered):
        return ()
    tokens = tuple(delivered.tolist() if hasattr(delivered, "tolist") else delivered)
    for token in tokens:
        if type(token) is not int or not 0 <= token < spec.vocab_size:
            raise InvalidRequest(
                f"delivered holds {shown(token)}; token ids are integers from 0 to {spec.vocab_size - 1}",
                "delivered",
            )
    if params.n > 1:
        raise InvalidRequest(
            f"delivered is of one output, and n={params.n}: ask for each by itself, with the parameters that "
            "SamplingParams.of_choice gives",
            "delivered",
        )
    longest = 0 if params.max_tokens == 0 else sampling.max_tokens
    if len(tokens) >= longest:
        raise InvalidRequest(
            f"delivered holds {len(tokens)} tokens, and the output has {longest} at most: it has ended",
            "delivered",
        )
    if ends := frozenset(unpack_int32(sampling.stop_ids)).intersection(tokens):
        raise InvalidRequest(
            f"delivered holds {min(ends)}, a token that ends the output: nothing comes behind it", "delivered"
        )
    return tokens


def go_on_behind(delivered: Sequence[int], request: Request) -> None:
    """Has a request go on as if it had made these tokens, and its client had taken them.

    Args:
        delivered: from `check_delivered`.
        request: of which all is known but that.

    Raises:
        InvalidRequest: they hold a stop string: nothing comes behind it.
    """
    request.received.extend(delivered)
    request.num_looked_at = request.num_taken = len(delivered)
    if request.logprobs is not None:
        request.logprobs.go_on_behind(len(delivered))
    if request.text is not None and (stopped := request.text.push(delivered).stopped) is not None:
        raise InvalidRequest(
            f"delivered holds the stop string {stopped!r}: nothing comes behind it", "delivered"
        )
