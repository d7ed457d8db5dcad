"""Two replicas on a Ray cluster of this machine, one of which is killed under 200 streams.

    python -m tests.integrations.on_ray MODEL PORT FOLDER

Says what it saw as JSON, on its last line.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import httpx
import psutil
import ray
from ray import serve

from tpworker.integrations.ray import build_app

NUM_STREAMS, LENGTH = 200, 40
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "n": 2},
    {"temperature": 1.0, "stop": ["ab", "Q"]},
    {"temperature": 0.7, "repetition_penalty": 1.2, "min_p": 0.02},
    {"temperature": 1.0, "guided_regex": "[a-f]{3,9}(-[0-9]{2}){9}"},
]
Output = dict[int, list[Any]]


class Streams:
    """All of them at once, and how far they are."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.num_tokens = 0

    async def all(self) -> list[Output]:
        limits = httpx.Limits(max_connections=NUM_STREAMS)
        async with httpx.AsyncClient(base_url=self._url, timeout=120, limits=limits) as client:
            return await asyncio.gather(*(self._one(client, number) for number in range(NUM_STREAMS)))

    async def _one(self, client: httpx.AsyncClient, number: int) -> Output:
        """Of each choice: its tokens, its text, and why it ended."""
        body = {"prompt": f"hello {number}", "max_tokens": LENGTH, "seed": number, "stream": True}
        body |= {"return_token_ids": True, **KINDS[number % len(KINDS)]}
        found: Output = {}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                for choice in json.loads(line[6:])["choices"]:  # an error has none
                    one = found.setdefault(choice["index"], [[], "", None])
                    one[0] += choice["token_ids"]
                    one[1] += choice["text"]
                    one[2] = choice["finish_reason"] or one[2]
                    self.num_tokens += len(choice["token_ids"])
        return found


def replicas() -> list[psutil.Process]:
    """Their actors; a process that one of them begins is called as it is, for a moment."""
    children = psutil.Process().children(recursive=True)
    actors = {child.pid: child for child in children if "TpGroup" in " ".join(child.cmdline())}
    return [child for child in actors.values() if child.ppid() not in actors]


async def faulty(url: str) -> dict[str, Any]:
    streams = Streams(url)
    expected = await streams.all()
    enough = streams.num_tokens // 4
    streams.num_tokens = 0
    disturbed = asyncio.create_task(streams.all())
    while streams.num_tokens < enough and not disturbed.done():
        await asyncio.sleep(0.01)
    victim, *others = replicas()
    processes = [victim, *victim.children(recursive=True)]
    names = sorted(process.name() for process in processes[1:])
    victim.kill()
    found = await disturbed
    _, left = psutil.wait_procs(processes, 10)
    metrics = httpx.get(f"{url}/metrics").text.splitlines()
    models = httpx.get(f"{url}/v1/models", headers={"X-Request-Id": "mine"})
    reset = httpx.post(f"{url}/reset_prefix_cache")
    (moved,) = (line for line in metrics if line.startswith("tpworker_resumed_requests_total"))
    return {
        "num_others": len(others),
        "differ": [number for number in range(NUM_STREAMS) if found[number] != expected[number]],
        "reasons": sorted({str(choice[2]) for output in found for choice in output.values()}),
        "num_tokens": streams.num_tokens,
        "names": names,
        "left": [process.name() for process in left],
        "request_ids": models.headers.get_list("x-request-id"),
        "reset": reset.json(),
        "moved": float(moved.split()[1]),
    }


def main(model: str, port: int, folder: str) -> None:
    began = time.monotonic()
    try:
        ray.init(
            num_cpus=4,  # of Ray's own count
            object_store_memory=100 * 1024 * 1024,
            include_dashboard=False,
            _temp_dir=folder,
        )
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        options = {"model": model, "num_replicas": 2, "num_cpus": 1, "device": "cpu", "dtype": "float32"}
        serve.run(build_app(**options, tensor_parallel_size=1, max_num_seqs=128, num_kv_blocks=2000))
        ready = time.monotonic() - began
        seen = asyncio.run(faulty(f"http://127.0.0.1:{port}"))
    finally:
        serve.shutdown()
        ray.shutdown()
    print(json.dumps({**seen, "seconds": [ready, time.monotonic() - began]}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
