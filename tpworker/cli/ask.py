"""One question, one answer, on a terminal."""

from __future__ import annotations

import sys
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING

from tpworker.config import RuntimeConfig
from tpworker.runtime.runtime import Runtime
from tpworker.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tpworker.cli.terminal import StartProgress


async def answer(config: RuntimeConfig, question: str, progress: StartProgress) -> None:
    """Start a runtime, write its answer to stdout as it comes, and stop it.

    The answer is greedy, so that the same question has the same answer. A model without a chat template
    continues the text.

    Raises:
        ConfigError, ModelError, RuntimeFailed: the runtime cannot start, or fails; a model without a
            tokenizer, before any rank is started.
        InvalidRequest: the question is empty, or too long.
    """
    async with Runtime(config=config, progress=progress, needs_tokenizer=True) as runtime:
        progress.close()
        prompt = await runtime.prepare(partial(_prompt, runtime, question))
        async with aclosing(runtime.generate(prompt, SamplingParams(temperature=0.0))) as outputs:
            async for output in outputs:
                print(output.text, end="", flush=True)
        print()
        sys.stdout.flush()


def _prompt(runtime: Runtime, question: str) -> list[int]:
    tokenizer = runtime.tokenizer
    if not tokenizer.has_chat_template:
        return tokenizer.encode(question)
    text = tokenizer.apply_chat_template([{"role": "user", "content": question}])
    return tokenizer.encode(text, add_special_tokens=False)
