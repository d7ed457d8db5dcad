"""Several outputs as one stream of what is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from tpworker.outputs import RequestOutput

Outputs = AsyncGenerator[RequestOutput, None]


async def merge(
    streams: Sequence[Outputs], num_choices: int = 1
) -> AsyncGenerator[dict[int, RequestOutput], None]:
    """Yield what has come of all streams, by the number of the choice, as soon as something has.

    Args:
        streams: of one prompt each.
        num_choices: of each stream; those of the first come first.

    The first error of a stream is raised. All streams are closed at the end, and by closing this one.
    """
    if len(streams) == 1:  # the runtime itself joins what one slow consumer has not taken yet
        async with aclosing(streams[0]) as stream:
            async for output in stream:
                yield {output.index: output}
        return

    ready: dict[int, RequestOutput] = {}
    news = asyncio.Event()

    async def pump(index: int) -> None:
        try:
            async with aclosing(streams[index]) as stream:
                async for output in stream:
                    number = index * num_choices + output.index
                    ready[number] = _joined(ready[number], output) if number in ready else output
                    news.set()
        finally:
            news.set()

    pumps = [asyncio.create_task(pump(index)) for index in range(len(streams))]
    try:
        running = pumps
        while running:
            await news.wait()
            news.clear()
            for task in running:
                if task.done():
                    task.result()
            running = [task for task in running if not task.done()]
            if ready:
                yield ready.copy()
                ready.clear()
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


def _joined(first: RequestOutput, second: RequestOutput) -> RequestOutput:
    return second._replace(
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=None if second.logprobs is None else (first.logprobs or ()) + second.logprobs,
        prompt_logprobs=first.prompt_logprobs or second.prompt_logprobs,
    )
