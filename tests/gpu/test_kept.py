"""Memory of a GPU that outlives who maps it: killed in any way, found by the next, gone with the keeper."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaConfig

from tests.conftest import eventually
from tests.gpu.runners import TINY
from tests.model.helpers import tiny_model
from tpworker import Runtime, SamplingParams
from tpworker.ipc.child import KEEPER_NAME
from tpworker.runtime.keeping import Keeping

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

NUM_BYTES = 4 << 30
SLACK = 96 << 20  # of what else the driver may have taken meanwhile
VOCAB = 515


@pytest.fixture
def keeping() -> Iterator[Keeping]:
    keeping = Keeping(1, "cuda")
    keeping.start()
    yield keeping
    keeping.close()


def used() -> int:
    """Bytes of GPU 0 that are in use, whoever has them."""
    free, total = torch.cuda.mem_get_info(0)
    return int(total - free)


def run(keeping: Keeping, *more: str) -> dict[str, Any]:
    """What a process finds and leaves, which is killed then."""
    fd = keeping.fd(0)
    command = [sys.executable, "-m", "tests.children.kept_gpu", str(fd), keeping.keeper_address]
    process = subprocess.Popen(
        [*command, str(NUM_BYTES), *more], stdout=subprocess.PIPE, pass_fds=[fd], text=True
    )
    assert process.stdout is not None
    with process.stdout:
        line = process.stdout.readline()
        process.kill()
        began = time.perf_counter()
        process.wait()
    assert line, "it failed: see its traceback"
    found: dict[str, Any] = json.loads(line)
    print(found, f"reaped in {time.perf_counter() - began:.3f} s")
    return found


def test_who_is_killed_leaves_what_the_next_one_finds(keeping: Keeping) -> None:
    torch.cuda.synchronize()
    before = used()
    first = run(keeping)
    assert (first["found"], first["same"]) == (False, True)
    assert used() - before > NUM_BYTES - SLACK
    for _ in range(2):
        again = run(keeping)
        assert (again["found"], again["same"]) == (True, True)
    held = used()
    keeping.forget()
    keeping.start()
    assert run(keeping)["found"] is False
    assert abs(used() - held) < SLACK, "a killed process keeps the keeper's memory from being freed"


def test_what_was_not_finished_is_made_anew_in_its_place(keeping: Keeping) -> None:
    for _ in range(3):
        assert run(keeping, "unfinished")["found"] is False
        after = used()
    assert run(keeping)["found"] is False
    assert abs(used() - after) < SLACK


def test_after_the_keepers_end_no_memory_is_left() -> None:
    torch.zeros(1, device="cuda")
    before = used()
    keeping = Keeping(1, "cuda")
    keeping.start()
    run(keeping)
    print(f"a keeper's context takes {(used() - before - NUM_BYTES) >> 20} MiB")
    began = time.perf_counter()
    keeping.close()
    print(f"the keeper has ended in {time.perf_counter() - began:.3f} s")
    eventually(lambda: used() - before < SLACK, lambda: f"{(used() - before) >> 20} MiB are left")


# ------------------------------------------------------------------------------- a whole runtime


def children() -> dict[str, psutil.Process]:
    return {child.name(): child for child in psutil.Process().children(recursive=True)}


def erase_tensors(folder: Path) -> None:
    """Of the files of a model, all but the headers: whoever reads weights now reads zeros."""
    for path in folder.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        data[start:] = bytes(len(data) - start)
        path.write_bytes(data)


def test_a_rank_that_comes_back_reads_no_weights_and_computes_no_prompt_again(tmp_path: Path) -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 512}
    config = LlamaConfig(**TINY, **sizes, num_hidden_layers=3, num_attention_heads=4)
    tiny_model(tmp_path, config, torch.bfloat16)
    params = SamplingParams(detokenize=False, ignore_eos=True, temperature=0.0, max_tokens=40)
    prompt = [number * 7 % VOCAB for number in range(100)]

    async def outputs(runtime: Runtime) -> tuple[list[int], int]:
        found = [output async for output in runtime.generate(prompt, params)]
        return [token for output in found for token in output.token_ids], found[-1].num_cached_tokens

    async def main() -> None:
        async with Runtime(
            tmp_path, device="cuda", max_num_seqs=4, max_num_batched_tokens=128, num_kv_blocks=64
        ) as runtime:
            first, _ = await outputs(runtime)
            erase_tensors(tmp_path)
            before = children()
            began = time.perf_counter()
            before["tpworker-rank0"].kill()
            again, cached = await outputs(runtime)
            print(f"answered {time.perf_counter() - began:.2f} s after the kill")
            assert again == first
            assert cached > 0, "its keys and values are gone"
            assert runtime.stats().restarts == 1
            after = children()
            assert after["tpworker-rank0"].pid != before["tpworker-rank0"].pid
            assert after[KEEPER_NAME].pid == before[KEEPER_NAME].pid

    asyncio.run(asyncio.wait_for(main(), 120))
    assert KEEPER_NAME not in children()
