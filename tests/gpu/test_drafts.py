"""Steps with drafts on a GPU, captured: the tokens of plain steps, with drafts that are looked up."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.gpu.runners import BLOCK_SIZE, BLOCKS_PER_SLOT, MAX_MODEL_LEN, NUM_SLOTS, TINY
from tests.model.helpers import tiny_model
from tpworker.checkpoint.weights import load_weights
from tpworker.ipc.arrays import pack_int32
from tpworker.ipc.messages import Admission, BatchPlan, Chunk, Sampling
from tpworker.kernels.operands import NO_TOKEN
from tpworker.model.decoder import Decoder
from tpworker.model.families import read_spec
from tpworker.model.kv_cache import KVCache
from tpworker.model.tp import Shard
from tpworker.rank.collectives import SoleRank
from tpworker.rank.cuda import CudaDevice
from tpworker.rank.device import Device
from tpworker.rank.drafter import NgramDrafter
from tpworker.rank.runner import Runner
from tpworker.rank.slots import SlotTable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
VOCAB = 67  # few, so that a random model repeats itself
NUM_TOKENS = 90  # of each output
MARGIN = 0.15  # as in test_cuda_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 512}
    tiny_model(
        folder, LlamaConfig(**TINY, **sizes, num_hidden_layers=3, num_attention_heads=4), torch.bfloat16
    )
    return folder


def prompts() -> list[list[int]]:
    draw = random.Random(3)
    return [draw.choices(range(VOCAB), k=draw.randint(1, 120)) for _ in range(NUM_SLOTS - 1)]


def make_runner(folder: Path, device: Device, dtype: torch.dtype, num_drafts: int) -> Runner:
    spec = read_spec(folder)
    shard, where = Shard.of(spec, 0, 1), device.torch_device
    with torch.inference_mode():
        decoder = Decoder(
            spec,
            load_weights(folder, spec, shard, dtype, where),
            shard,
            SoleRank(),
            MAX_MODEL_LEN + num_drafts,
        )
        cache = KVCache(spec, shard, NUM_SLOTS * BLOCKS_PER_SLOT + 1, BLOCK_SIZE, dtype, where)
        table = SlotTable(
            NUM_SLOTS, BLOCKS_PER_SLOT + 1, where, (0, shard.vocab.local), None, num_drafts, MAX_MODEL_LEN
        )
        drafter = NgramDrafter(table, 4, 2) if num_drafts else None
        return Runner(decoder, cache, table, device, SoleRank(), 4, drafter=drafter)


def generate(runner: Runner, num_drafts: int) -> tuple[list[list[int]], int]:
    """Greedy outputs of `prompts`, half of which come later; and how many drafts were right."""
    greedy = Sampling(0.0, 1.0, 0, 0, NUM_TOKENS, 0, b"")
    outputs: list[list[int]] = [[] for _ in prompts()]
    decoding: list[int] = []
    num_right = step = 0
    comings = [range(len(outputs) // 2), range(len(outputs) // 2, len(outputs))]
    while comings or any(len(output) < NUM_TOKENS for output in outputs):
        assert step < 2 * NUM_TOKENS, "an output does not go on"
        coming = comings.pop(0) if step % 5 == 0 and comings else range(0)
        admitted = tuple(
            Admission(
                slot,
                pack_int32(prompts()[slot]),
                len(prompts()[slot]),
                0,
                pack_int32(range(BLOCKS_PER_SLOT * slot + 1, BLOCKS_PER_SLOT * (slot + 1) + 1)),
                greedy,
                max_length=len(prompts()[slot]) + NUM_TOKENS,
            )
            for slot in coming
        )
        chunks = tuple(Chunk(slot, 0, len(prompts()[slot]), True) for slot in coming)
        plan = BatchPlan(
            0, step, admitted=admitted, chunks=chunks, decode=pack_int32(decoding), num_drafts=num_drafts
        )
        launched = runner.launch(plan)
        launched.done.synchronize()
        runner.staging.give_back(launched.staging)
        number, *rest = launched.ring_row.tolist()
        assert number == step
        width, stride = 1 + num_drafts, 1 + num_drafts + (num_drafts > 0)
        for place, slot in enumerate([*decoding, *coming]):
            tokens = [x for x in rest[place * stride :][:width] if x != NO_TOKEN]
            num_right += max(0, len(tokens) - 1)
            outputs[slot] += tokens
        decoding += coming
        step += 1
    return outputs, num_right


def check_greedy(folder: Path, outputs: list[list[int]]) -> None:
    """Every token is the most likely one to transformers, or within a small margin of it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
    for prompt, output in zip(prompts(), outputs, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + output[:-1]], device="cuda")).logits[0, len(prompt) - 1 :]
        chosen = logits.float().cpu().gather(1, torch.tensor(output)[:, None])[:, 0]
        assert float((logits.float().cpu().max(dim=1).values - chosen).max()) < MARGIN


@pytest.mark.parametrize("num_drafts", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_captured", [True, False])
def test_tokens_are_those_of_plain_steps(
    folder: Path, num_drafts: int, dtype: torch.dtype, is_captured: bool
) -> None:
    """Not one too many at the end of a sequence; in float32 the same ones, bit by bit."""
    runners = [make_runner(folder, CudaDevice(0), dtype, number) for number in (0, num_drafts)]
    if is_captured:
        for runner in runners:
            runner.prepare(64)
    plain, _ = generate(runners[0], 0)
    outputs, num_right = generate(runners[1], num_drafts)
    assert [len(output) for output in outputs] == [NUM_TOKENS] * len(outputs)
    assert num_right > NUM_TOKENS, "drafts were right"
    if dtype == torch.float32:
        assert outputs == plain
    else:
        check_greedy(folder, outputs)
