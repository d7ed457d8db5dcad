"""Logprobs and rules for logits of the default model, its whole vocabulary, in fp32: those of transformers.

Not by `generate`, which takes seconds: what is greedy is proved of a whole answer by one forward over it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from tpworker import RequestOutput, Runtime, SamplingParams
from tpworker.outputs import TokenLogprobs
from tpworker.text.tokenizer import Tokenizer

pytestmark = pytest.mark.timeout(240)

TEXT = "Once upon a time, in a land far away, there lived a king who had three daughters and no"
NUM_TOP = 5
CLOSE = 1e-4
LENGTH = 12


class Reference:
    """transformers' model of the same files."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.load(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.prompt = self.tokenizer.encode(TEXT)
        self.vocab_size: int = self.model.config.vocab_size

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """[T, V]: row i is of what follows the tokens up to i."""
        with torch.inference_mode():
            return self.model(torch.tensor([list(tokens)])).logits[0]  # type: ignore[no-any-return]

    def logprobs(self, tokens: Sequence[int]) -> Tensor:
        """The same, log_softmax in float64."""
        return self.logits(tokens).double().log_softmax(dim=-1)

    def check_greedy(self, answer: Sequence[int], *processors: Any) -> None:
        """Each token is the best one behind those before it, after these of transformers' processors."""
        assert len(answer) == LENGTH
        tokens = [*self.prompt, *answer]
        logits, process = self.logits(tokens), LogitsProcessorList(processors)
        for place in range(len(self.prompt), len(tokens)):
            scores = process(torch.tensor([tokens[:place]]), logits[place - 1][None].clone())
            assert tokens[place] == int(scores.argmax()), place


@pytest.fixture(scope="module")
def reference(real_model: Path) -> Iterator[Reference]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more wait for each other where others work
    yield Reference(real_model)
    torch.set_num_threads(threads)


def check(found: Sequence[TokenLogprobs | None] | None, tokens: Sequence[int], expected: Tensor) -> None:
    """Of these tokens, each by the row of `expected` at its place."""
    assert found is not None
    assert len(found) == len(tokens)
    for told, token, row in zip(found, tokens, expected, strict=True):
        assert told is not None
        assert told.token_id == token
        assert told.logprob == pytest.approx(float(row[token]), abs=CLOSE)
        best = row.topk(NUM_TOP)
        assert [p for _, p in told.top] == pytest.approx(best.values.tolist(), abs=CLOSE)
        assert [p for _, p in told.top] == pytest.approx(row[[i for i, _ in told.top]].tolist(), abs=CLOSE)
        assert told.top[0][0] == int(best.indices[0])


async def whole(runtime: Runtime, prompt: Any, **params: Any) -> list[RequestOutput]:
    settings = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": LENGTH, **params})
    return [output async for output in runtime.generate(prompt, settings)]


def tokens_of(outputs: Sequence[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def logprobs_of(outputs: Sequence[RequestOutput]) -> list[TokenLogprobs]:
    return [told for output in outputs for told in output.logprobs or ()]


def start(folder: Path, num_ranks: int) -> Runtime:
    return Runtime(
        folder, tensor_parallel_size=num_ranks, device="cpu", dtype="float32", max_model_len=128,
        max_num_seqs=8, max_num_batched_tokens=16, block_size=4, check_ranks_agree=True,
    )  # fmt: skip


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_logprobs_are_transformers(real_model: Path, reference: Reference, num_ranks: int) -> None:
    """The prompt in two chunks, and its blocks in the prefix cache before it is told of; all at once."""
    prompt = reference.prompt
    assert len(prompt) > 16

    async def main() -> None:
        async with start(real_model, num_ranks) as runtime:
            first = await whole(runtime, TEXT, max_tokens=1)
            assert first[-1].num_cached_tokens == 0
            told, plain, none, drawn = await asyncio.gather(
                whole(runtime, TEXT, logprobs=NUM_TOP, prompt_logprobs=NUM_TOP),
                whole(runtime, TEXT, logprobs=NUM_TOP),
                whole(runtime, prompt, prompt_logprobs=NUM_TOP, logprobs=NUM_TOP, max_tokens=0),
                whole(runtime, TEXT, logprobs=NUM_TOP, temperature=0.9, top_p=0.9, min_p=0.05, seed=3,
                      repetition_penalty=1.2),
            )  # fmt: skip
            assert plain[-1].num_cached_tokens > 0
            greedy = tokens_of(told)
            assert tokens_of(plain) == greedy
            reference.check_greedy(greedy)
            rows = reference.logprobs(prompt + greedy)
            for outputs in (told, plain):
                check(logprobs_of(outputs), greedy, rows[len(prompt) - 1 : -1])
            (end,) = none
            assert (end.token_ids, end.finish_reason, end.logprobs) == ((), "length", ())
            for of_prompt in (told[0].prompt_logprobs, end.prompt_logprobs):
                assert of_prompt is not None
                assert of_prompt[0] is None
                check(of_prompt[1:], prompt[1:], rows[: len(prompt) - 1])
            sampled = tokens_of(drawn)
            of_sampled = reference.logprobs(prompt + sampled)[len(prompt) - 1 : -1]
            check(logprobs_of(drawn), sampled, of_sampled)  # of the logits as they were

    asyncio.run(main())


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_greedy_answers_under_rules_are_transformers(
    real_model: Path, reference: Reference, num_ranks: int
) -> None:
    async def main() -> None:
        async with start(real_model, num_ranks) as runtime:
            greedy = tokens_of(await whole(runtime, TEXT))
            cases = rules(reference, greedy)
            answers = await asyncio.gather(*(whole(runtime, TEXT, **params) for params, _ in cases.values()))
            for (name, (_, processors)), answer in zip(cases.items(), answers, strict=True):
                assert tokens_of(answer) != greedy, name
                reference.check_greedy(tokens_of(answer), *processors)

    asyncio.run(main())


def rules(
    reference: Reference, greedy: list[int]
) -> dict[str, tuple[dict[str, Any], list[Callable[..., Tensor]]]]:
    """Parameters that change this answer, and transformers' processors for the same, in vLLM's order."""
    bias = {greedy[0]: -20.0, greedy[3]: 5.0, 28: 2.5}
    # Words out of what it would say, which come as tokens of a text behind a space.
    words = [reference.tokenizer.decode(greedy[place : place + 2]).strip() for place in (2, 6)]
    texts = [text for word in words for text in (word, f" {word}")]
    barred = [reference.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert max(map(len, barred)) > 1
    allowed = sorted({*reference.prompt, *greedy[::2], *range(300, 900)})
    forbidden = torch.tensor(sorted(set(range(reference.vocab_size)) - set(allowed)))
    of_bias = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    of_words = NoBadWordsLogitsProcessor(barred, eos_token_id=None)
    of_allowed = SuppressTokensLogitsProcessor(forbidden)
    return {
        "repetition": ({"repetition_penalty": 1.3}, [RepetitionPenaltyLogitsProcessor(1.3)]),
        "bias": ({"logit_bias": bias}, [of_bias]),
        "words": ({"bad_words": words}, [of_words]),
        "allowed": ({"allowed_token_ids": allowed}, [of_allowed]),
        "all": (
            {"repetition_penalty": 1.1, "logit_bias": bias, "bad_words": words, "allowed_token_ids": allowed},
            [of_bias, RepetitionPenaltyLogitsProcessor(1.1), of_allowed, of_words],
        ),
    }
