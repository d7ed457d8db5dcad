"""What a request asks for: checked, and completed, before anything is composed.

What can be wrong with a request is found here, and fails that request alone (invariant 8).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tpworker.config import SchedulingPolicy
from tpworker.errors import InvalidRequest, PromptTooLong
from tpworker.ipc.arrays import pack_int32, unpack_int32
from tpworker.ipc.messages import NO_LOGPROBS, Sampling
from tpworker.runtime.rules import Encode, resolve_rules
from tpworker.sampling_params import MAX_STOP_IDS, SamplingParams
from tpworker.values import number

if TYPE_CHECKING:
    from tpworker.model.families import ModelSpec


def pack_prompt(token_ids: Sequence[int], spec: ModelSpec) -> bytes:
    """A prompt's token ids as int32, 4 bytes each.

    Args:
        token_ids: a sequence of whatever is an integer; or an array or a tensor of them.
        spec: of the model.

    Raises:
        InvalidRequest: it is empty, or holds what is no id of the model's vocabulary.
    """
    highest = spec.vocab_size - 1
    try:
        # An array's or a tensor's `tolist` has Python's own types; to go through it would be slow besides.
        if isinstance(token_ids, (Mapping, Set)):  # which have no order that anybody meant
            raise TypeError(f"got {type(token_ids).__name__}")
        listed = token_ids.tolist() if hasattr(token_ids, "tolist") else list(token_ids)
        if any(kind is not int for kind in set(map(type, listed))):
            listed = [number(one, int) for one in listed]
            if bool in map(type, listed):
                raise TypeError("a bool is no token id")
            if any(getattr(one, "ndim", 0) for one in listed):  # one element would do for `__index__`
                raise TypeError("an array is no token id")
        packed = pack_int32(listed)
    except (TypeError, OverflowError) as error:
        raise InvalidRequest(
            f"the prompt must be a string, or token ids from 0 to {highest}: {error}", "prompt"
        ) from None
    ids = unpack_int32(packed)
    if not ids:
        raise InvalidRequest("the prompt is empty: give at least one token", "prompt")
    if min(ids) < 0 or max(ids) > highest:
        wrong = next(i for i in ids if not 0 <= i <= highest)
        raise InvalidRequest(
            f"the prompt holds token id {wrong}; the model's vocabulary has 0 to {highest}", "prompt"
        )
    return packed


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds the length of a request, in tokens."""

    max_model_len: int  # as configured
    model: int  # as the model was made
    kv_blocks: int  # what all KV blocks together can hold

    @property
    def shortest(self) -> int:
        """Most tokens of one request."""
        return min(self.max_model_len, self.kv_blocks)

    def explain(self) -> tuple[str, str]:
        """The limit that counts, and what can be done about it."""
        if self.kv_blocks < self.max_model_len:
            limit = f"the KV blocks here hold {self.kv_blocks} (max_model_len is {self.max_model_len})"
            return limit, "give the runtime more memory (--gpu-memory-utilization)"
        if self.max_model_len < self.model:
            return f"max_model_len is {self.max_model_len}", "raise --max-model-len"
        return f"the model was made for at most {self.model}", "use a model with a longer context"

    def check_length(self, num_tokens: int, num_chars: int) -> None:
        """Refuse a prompt before it is tokenised.

        Args:
            num_tokens: that it has at least.
            num_chars: that it has.

        Raises:
            PromptTooLong: that is too many already.
        """
        if num_tokens > self.shortest:
            what, remedy = self.explain()
            raise PromptTooLong(
                f"the prompt has {num_chars} characters, which are {num_tokens} tokens at least, but {what}: "
                f"shorten the prompt, or {remedy}",
                "prompt",
            )


def fit(params: SamplingParams, num_prompt: int, limits: Limits) -> int:
    """The request's max_tokens: what it asks for, or as many as fit behind its prompt.

    A step yields a token at least, so of 0 it is 1: that one is nobody's, and needs no room.

    Raises:
        PromptTooLong: the prompt, or the prompt and max_tokens, do not fit.
        InvalidRequest: min_tokens do not fit.
    """
    limit = limits.shortest
    what, remedy = limits.explain()
    least = 0 if params.max_tokens == 0 else 1
    if num_prompt + least > limit:
        for_answer = ", and at least one must be left for the answer" if least else ""
        raise PromptTooLong(
            f"the prompt has {num_prompt} tokens, but {what}{for_answer}: shorten the prompt, or {remedy}",
            "prompt",
        )
    if params.max_tokens is not None and num_prompt + params.max_tokens > limit:
        raise PromptTooLong(
            f"the prompt has {num_prompt} tokens and max_tokens is {params.max_tokens}, together "
            f"{num_prompt + params.max_tokens}, but {what}: ask for at most {limit - num_prompt} tokens, or "
            f"{remedy}",
            "max_tokens",
        )
    max_tokens = limit - num_prompt if params.max_tokens is None else max(1, params.max_tokens)
    if params.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens={params.min_tokens}: only {max_tokens} tokens fit after this prompt", "min_tokens"
        )
    return max_tokens


def check_priority(params: SamplingParams, policy: SchedulingPolicy) -> None:
    """Refuse a priority where nobody would look at it.

    Raises:
        InvalidRequest: it is not 0, and the policy is `fcfs`.
    """
    if params.priority and policy != "priority":
        raise InvalidRequest(
            f"priority={params.priority}: requests are taken as they come here (scheduling_policy={policy}): "
            "leave it out, or start with --scheduling-policy priority",
            "priority",
        )


def resolve_sampling(
    params: SamplingParams, spec: ModelSpec, max_tokens: int, seed: int, encode: Encode | None = None
) -> Sampling:
    """Sampling parameters with every default filled in: the request's, else the model's, else ours.

    Args:
        params: what the request asks for.
        spec: of the model.
        max_tokens: see `fit`.
        seed: for a request that gives none.
        encode: see `resolve_rules`.

    Raises:
        InvalidRequest: a stop token outside the vocabulary, or too many of them; or see `resolve_rules`.
    """
    wrong = [i for i in params.stop_token_ids if i >= spec.vocab_size]
    if wrong:
        raise InvalidRequest(
            f"stop_token_ids holds {wrong[0]}; the model's vocabulary has 0 to {spec.vocab_size - 1}",
            "stop_token_ids",
        )
    model_stop_ids = () if params.ignore_eos else spec.eos_ids
    stop_ids = list(dict.fromkeys((*model_stop_ids, *params.stop_token_ids)))
    if len(stop_ids) > MAX_STOP_IDS:
        raise InvalidRequest(
            f"stop_token_ids: with the model's {len(model_stop_ids)} end-of-sequence tokens these are "
            f"{len(stop_ids)} different ids; the limit is {MAX_STOP_IDS} together",
            "stop_token_ids",
        )

    defaults = spec.generation_defaults

    def chosen(asked: float | None, name: str, otherwise: float) -> float:
        return asked if asked is not None else defaults.get(name, otherwise)

    return Sampling(
        temperature=float(chosen(params.temperature, "temperature", 1.0)),
        top_p=float(chosen(params.top_p, "top_p", 1.0)),
        top_k=max(0, int(chosen(params.top_k, "top_k", 0))),
        seed=seed if params.seed is None else params.seed,
        max_tokens=max_tokens,
        min_tokens=params.min_tokens,
        stop_ids=pack_int32(stop_ids),
        min_p=float(chosen(params.min_p, "min_p", 0.0)),
        rules=resolve_rules(params, spec, encode, stop_ids if params.min_tokens else ()),
        num_logprobs=NO_LOGPROBS if params.logprobs is None else params.logprobs,
        num_prompt_logprobs=NO_LOGPROBS if params.prompt_logprobs is None else params.prompt_logprobs,
    )
