"""Clients of an OpenAI-compatible server, and what they see of it."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

_TIMEOUT = 600.0


@dataclass(frozen=True, slots=True)
class Request:
    """One request as its client saw it. Seconds."""

    num_tokens: int
    first: float
    """From sending to the first text."""
    each: float
    """Mean time between two tokens after that."""


@dataclass(frozen=True, slots=True)
class Round:
    """All requests of a round. `began` and `ended` are of time.monotonic_ns(), as a step's times are."""

    requests: list[Request]
    began: int
    ended: int

    @property
    def seconds(self) -> float:
        return (self.ended - self.began) / 1e9

    @property
    def tokens_per_second(self) -> float:
        return sum(request.num_tokens for request in self.requests) / self.seconds


def random_prompts(seed: int, number: int, length: int, vocab_size: int) -> list[list[int]]:
    """Token ids of an exact length, that no prefix cache knows."""
    draw = random.Random(seed)
    return [draw.choices(range(vocab_size), k=length) for _ in range(number)]


async def run_round(url: str, prompts: Sequence[Sequence[int]], output_len: int, concurrency: int) -> Round:
    """Sends all prompts, at most `concurrency` at a time; every answer has `output_len` tokens."""
    places = asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT, limits=limits) as client:

        async def send(prompt: Sequence[int]) -> Request:
            async with places:
                return await _request(client, prompt, output_len)

        began = time.monotonic_ns()
        requests = await asyncio.gather(*(send(prompt) for prompt in prompts))
        return Round(requests, began, time.monotonic_ns())


async def _request(client: httpx.AsyncClient, prompt: Sequence[int], output_len: int) -> Request:
    body = {
        "prompt": prompt,
        "max_tokens": output_len,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent = time.monotonic()
    first = last = None
    num_tokens = 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != httpx.codes.OK:
            raise RuntimeError(
                f"the server answers {response.status_code}: {(await response.aread()).decode()}"
            )
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(f"the server gave up: {event['error']}")
            if event["choices"]:
                last = time.monotonic()
                first = first or last
            elif event["usage"]:
                num_tokens = event["usage"]["completion_tokens"]
    if num_tokens != output_len or first is None or last is None:
        raise RuntimeError(f"{num_tokens} tokens came instead of {output_len}")
    return Request(num_tokens, first - sent, (last - first) / max(1, num_tokens - 1))
