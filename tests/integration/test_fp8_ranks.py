"""Real ranks of a checkpoint in FP8: outputs are those of what its weights stand for, after any change."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.checkpoint.test_mtp_weights import make
from tests.model.fp8_checkpoints import publish
from tpworker import ModelError, Runtime, SamplingParams

pytestmark = pytest.mark.usefixtures("nothing_left")

OPTIONS: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "dtype": "float32",
    "num_kv_blocks": 40,
    "block_size": 8,
}
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, detokenize=False, ignore_eos=True)


async def tokens(runtime: Runtime) -> list[int]:
    found = [t async for output in runtime.generate([1, 5, 9, 7, 3], GREEDY) for t in output.token_ids]
    assert len(found) == 24
    return found


def test_outputs_are_those_of_what_the_weights_stand_for(tmp_path: Path) -> None:
    folder = publish(make("glm", tmp_path / "model"), tmp_path, "blocks")

    async def main() -> None:
        async with Runtime(tmp_path / "plain", **OPTIONS) as runtime:
            assert runtime.quantization == ""
            expected = await tokens(runtime)
            with pytest.raises(ModelError, match="quantization is"):
                await runtime.update_weights(folder)
        with_drafts = OPTIONS | {"speculative_method": "mtp", "num_speculative_tokens": 2}
        async with Runtime(folder, **with_drafts) as runtime:
            assert runtime.quantization == "fp8"
            assert await tokens(runtime) == expected
            await runtime.sleep()
            await runtime.wake_up()
            assert await tokens(runtime) == expected
            await runtime.update_weights(load_file(folder / "model.safetensors").items())
            assert await tokens(runtime) == expected

    asyncio.run(main())
