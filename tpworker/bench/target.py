"""What a server is: its model, whether it takes token ids, and how it counts the tokens of a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpworker.bench.client import CHAT, COMPLETIONS, count_of, fetch
from tpworker.bench.connection import Pool, RequestLost
from tpworker.bench.plan import WORDS
from tpworker.errors import ConfigError, TpworkerError, printable

_USUAL_IDS = (1000, 20_000)
"""Tokens that nearly every model has, where the server does not tell how many there are."""
_FEW, _MORE = 8, 40
"""Words whose tokens are counted."""


class Unreachable(TpworkerError):
    """The server does not answer, or not as is needed."""


@dataclass(frozen=True, slots=True)
class Target:
    """What has been found out."""

    model: str
    server: str
    """What it says it is, in the header Server; '': nothing."""
    token_ids: tuple[int, int] | None
    """See `Plan`, as the two that follow."""
    tokens_per_word: float
    overhead: float


async def find_out(
    pool: Pool, *, model: str | None, is_chat: bool, needs_lengths: bool, as_text: bool
) -> Target:
    """Asks a server what has to be known of it.

    Args:
        pool: to it.
        model: which one; None: the first that it has.
        is_chat: which endpoint is measured.
        needs_lengths: whether prompts are made up, of some length.
        as_text: whether they are text, even if it takes token ids.

    Raises:
        Unreachable: it does not answer.
        ConfigError: it answers that it cannot do that.
    """
    try:
        model = model or await _first_model(pool)
        ids = None
        if needs_lengths and not is_chat and not as_text:
            ids = await _token_ids(pool, model)
        per_word, overhead = 1.0, 0.0
        if needs_lengths and ids is None:
            per_word, overhead = await _count_tokens(pool, model, is_chat)
        status, version = await fetch(pool, "GET", "/version")
    except RequestLost as error:
        raise Unreachable(f"{pool.address.authority} does not answer: {error}") from None
    told = version.get("version") if status == 200 and isinstance(version, dict) else None
    return Target(model, str(told or ""), ids, per_word, overhead)


async def _first_model(pool: Pool) -> str:
    status, answer = await fetch(pool, "GET", "/v1/models")
    _check(status, answer, "/v1/models")
    try:
        return str(answer["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise ConfigError("/v1/models names no model: name one with --model") from None


def _check(status: int, answer: Any, path: str) -> None:
    if status in (401, 403):
        raise ConfigError(
            f"the server wants its API key (status {status}): --api-key-file, or TPWORKER_API_KEY"
        )
    if status == 404:
        raise ConfigError(f"there is no {path}, or no such model (status 404): {_message(answer)}")
    if status == 503:
        raise Unreachable(f"the server is not ready (status 503): {_message(answer)}")
    if status != 200:
        raise ConfigError(f"the server answers {path} with status {status}: {_message(answer)}")


def _message(answer: Any) -> str:
    error = answer.get("error", answer) if isinstance(answer, Mapping) else answer
    message = error.get("message", error) if isinstance(error, Mapping) else error
    return printable(" ".join(str(message).split())[:300])


async def _token_ids(pool: Pool, model: str) -> tuple[int, int] | None:
    """From which ids up to which; None: it takes none."""
    status, answer = await fetch(pool, "GET", "/tokenizer_info")
    size = answer.get("vocab_size") if status == 200 and isinstance(answer, dict) else None
    ids = (min(_USUAL_IDS[0], size // 4), size) if isinstance(size, int) and size > 1 else _USUAL_IDS
    body = {"model": model, "prompt": [ids[0], ids[1] - 1], "max_tokens": 1}
    status, answer = await fetch(pool, "POST", COMPLETIONS, body)
    if status in (400, 422, 500):
        return None
    _check(status, answer, COMPLETIONS)
    return ids


async def _count_tokens(pool: Pool, model: str, is_chat: bool) -> tuple[float, float]:
    """Tokens for each word of a text, and those that come with any text."""
    few, more = [await _num_tokens(pool, model, is_chat, number) for number in (_FEW, _MORE)]
    per_word = (more - few) / (_MORE - _FEW)
    if per_word <= 0:
        raise ConfigError("the server counts no more tokens in a longer prompt: its lengths cannot be told")
    return per_word, max(0.0, few - _FEW * per_word)


async def _num_tokens(pool: Pool, model: str, is_chat: bool, num_words: int) -> int:
    text = " ".join(WORDS[i % len(WORDS)] for i in range(num_words))
    said: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if is_chat else {"prompt": text}
    path = CHAT if is_chat else COMPLETIONS
    status, answer = await fetch(pool, "POST", path, {"model": model, **said, "max_tokens": 1})
    _check(status, answer, path)
    try:
        return count_of(answer["usage"]["prompt_tokens"])
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            f"{path} does not say how many tokens a prompt has (usage.prompt_tokens): its prompts are to "
            "come from a file (--dataset)"
        ) from None
