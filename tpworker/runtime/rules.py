"""What a request asks of its logits, from its parameters: checked against the model, as the ranks take it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tpworker.errors import InvalidRequest, shown
from tpworker.ipc.arrays import pack_float32, pack_int32
from tpworker.ipc.messages import MAX_BARRED, MAX_BARRED_LENGTH, LogitRules
from tpworker.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tpworker.model.families import ModelSpec

Encode = Callable[[str], Sequence[int]]
"""Token ids of a text, without special tokens around it."""


def resolve_rules(
    params: SamplingParams, spec: ModelSpec, encode: Encode | None, delayed: Sequence[int] = ()
) -> LogitRules | None:
    """The rules of a request; None: it has none, and its steps need not look.

    Args:
        params: what the request asks for.
        spec: of the model; its defaults count where the request is silent.
        encode: None: there is no tokenizer.
        delayed: token ids that its min_tokens forbid at first.

    Raises:
        InvalidRequest: a token outside the vocabulary, a word too long to bar, nothing left to choose.
    """
    repetition = params.repetition_penalty
    if repetition is None:
        repetition = spec.generation_defaults.get("repetition_penalty", 1.0)
    bias = sorted((token, value) for token, value in params.logit_bias.items() if value)
    _check_vocabulary("logit_bias", [token for token, _ in bias], spec)
    allowed = params.allowed_token_ids
    _check_vocabulary("allowed_token_ids", allowed or (), spec)
    words = _words(params.bad_words, encode)
    if allowed is not None:
        _check_choice(set(allowed), words, params, delayed)
    penalties = (float(repetition), float(params.presence_penalty), float(params.frequency_penalty))
    if penalties == (1.0, 0.0, 0.0) and not bias and allowed is None and not words:
        return None
    return LogitRules(
        *penalties,
        bias_ids=pack_int32(token for token, _ in bias),
        bias=pack_float32(value for _, value in bias),
        allowed_ids=None if allowed is None else pack_int32(allowed),
        barred=tuple(map(pack_int32, words)),
    )


def _check_choice(
    allowed: set[int], words: Sequence[tuple[int, ...]], params: SamplingParams, delayed: Sequence[int]
) -> None:
    """Whether there is something to choose at every step, whatever the tokens before it.

    A word of several tokens bars its last one behind the others. So that this leaves nothing at no time, one
    of the tokens that are allowed must end no word.
    """
    left = allowed - {word[0] for word in words if len(word) == 1}
    if not left:
        raise InvalidRequest(
            "bad_words bars every one of allowed_token_ids: there would be nothing to choose", "bad_words"
        )
    if left <= set(delayed):
        raise InvalidRequest(
            "allowed_token_ids leaves tokens that end the output alone, and "
            f"min_tokens={params.min_tokens} forbids them: there would be nothing to choose",
            "allowed_token_ids",
        )
    if left <= {word[-1] for word in words}.union(delayed):
        but_ends = f" (but those that min_tokens={params.min_tokens} forbids)" if delayed else ""
        raise InvalidRequest(
            f"every one of allowed_token_ids{but_ends} is the last token of one of bad_words: there may be "
            "nothing to choose behind their beginnings; allow a token that ends none of them",
            "bad_words",
        )


def _check_vocabulary(name: str, ids: Sequence[int], spec: ModelSpec) -> None:
    wrong = next((i for i in ids if i >= spec.vocab_size), None)
    if wrong is not None:
        raise InvalidRequest(
            f"{name} holds {wrong}; the model's vocabulary has 0 to {spec.vocab_size - 1}", name
        )


def _words(words: Sequence[str], encode: Encode | None) -> list[tuple[int, ...]]:
    """The tokens of each word, as it is and, unless it begins with one, behind a space."""
    if words and encode is None:
        raise InvalidRequest("bad_words are text, and this model has no tokenizer", "bad_words")
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        assert encode is not None
        for text in (word,) if word[0].isspace() else (word, f" {word}"):
            tokens = tuple(encode(text))
            if len(tokens) > MAX_BARRED_LENGTH:
                raise InvalidRequest(
                    f"bad_words: {shown(word)} has {len(tokens)} tokens; the limit is {MAX_BARRED_LENGTH} a "
                    "word: give a shorter part of it",
                    "bad_words",
                )
            if not tokens:
                raise InvalidRequest(f"bad_words: {shown(word)} has no tokens: leave it out", "bad_words")
            found[tokens] = None
    if sum(len(tokens) > 1 for tokens in found) > MAX_BARRED:
        raise InvalidRequest(
            f"bad_words are {sum(len(tokens) > 1 for tokens in found)} sequences of several tokens, at the "
            f"beginning of a text and behind a space; the limit is {MAX_BARRED}: give fewer words",
            "bad_words",
        )
    return list(found)
