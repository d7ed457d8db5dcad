#!/usr/bin/env python
"""How to embed tpworker: an orchestrator of your own around a model, with asyncio and without.

.venv/bin/python scripts/embed.py                         the default model, on two TP ranks
.venv/bin/python scripts/embed.py --model FOLDER --tensor-parallel-size 4
"""

from __future__ import annotations

import argparse
import asyncio
import logging
from contextlib import aclosing

from tpworker import InvalidRequest, QueueFull, Runtime, RuntimeConfig, SamplingParams, SyncRuntime

PROMPTS = ["The capital of France is", "Water boils at", "The opposite of hot is"]
GREEDY = SamplingParams(temperature=0, max_tokens=16)


def progress(text: str, fraction: float | None) -> None:
    print(f"  {text}" if fraction is None else f"  {text}: {fraction:.0%}")


async def with_asyncio(config: RuntimeConfig) -> None:
    """Streams several requests at once, gives one up half-way, and asks how the runtime is doing."""

    async def ask(runtime: Runtime, prompt: str) -> str:
        return "".join([output.text async for output in runtime.generate(prompt, GREEDY)])

    async with Runtime(config=config, progress=progress) as runtime:
        answers = await asyncio.gather(*(ask(runtime, prompt) for prompt in PROMPTS))
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            print(f"{prompt!r} -> {answer!r}")

        endless = SamplingParams(temperature=0.8, seed=1, ignore_eos=True)
        async with aclosing(runtime.generate("Once upon a time", endless)) as outputs:
            async for output in outputs:
                print(output.text, end="", flush=True)
                if output.num_output_tokens >= 40:
                    print(" … enough")
                    break  # leaving the block closes the generator, which aborts the request

        try:
            await ask(runtime, "word " * 100_000)
        except InvalidRequest as error:  # that request alone fails
            print(f"refused: {error}")
        except QueueFull:
            print("too busy: try again later")

        stats = runtime.stats()
        print(
            f"{runtime.health().state}: {stats.steps} steps, {stats.output_tokens} tokens, {stats.open} open"
        )
        await runtime.drain(timeout=30)  # before a planned end: no new requests, the open ones finish


def without_asyncio(config: RuntimeConfig) -> None:
    """The same from plain code: one stream, then a batch."""
    with SyncRuntime(config=config) as runtime:
        chat = [{"role": "user", "content": "Name three colours."}]
        prompt = runtime.tokenizer.encode(
            runtime.tokenizer.apply_chat_template(chat), add_special_tokens=False
        )
        for output in runtime.generate(prompt, SamplingParams(temperature=0, max_tokens=40)):
            print(output.text, end="", flush=True)
        print()
        for completion in runtime.complete(PROMPTS, GREEDY):
            print(f"{completion.num_output_tokens} tokens, ended by {completion.finish_reason!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Examples of embedding tpworker.")
    parser.add_argument("--model", help="a folder or a hub name; without it the default model")
    parser.add_argument("--tensor-parallel-size", type=int, default=2)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)  # tpworker sets up no logging of its own
    config = RuntimeConfig(model=arguments.model, tensor_parallel_size=arguments.tensor_parallel_size)
    print("— with asyncio —")
    asyncio.run(with_asyncio(config))
    print("— without —")
    without_asyncio(config)


if __name__ == "__main__":
    main()
