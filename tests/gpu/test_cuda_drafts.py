"""Drafts on CUDA ranks: every token is one that the model would choose, whatever was drafted before it.

Steps are launched one by one, captured and as they are, with any number of drafts; and whole runtimes, in
which the scheduler chooses it, in torch's sync debug mode 'error'.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.gpu.runners import BLOCKS_PER_SLOT, TINY, cuda_runners
from tests.gpu.test_cuda_ranks import MARGIN, VOCAB, assert_greedy, collect, gpus, prompts, start
from tests.model.mtp_reference import make_checkpoint
from tpworker.ipc.arrays import pack_int32
from tpworker.ipc.messages import Admission, BatchPlan, Chunk, Sampling
from tpworker.kernels.operands import NO_TOKEN
from tpworker.rank.cuda import CudaDevice
from tpworker.rank.runner import Launched, Runner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

NUM = 7
"""Requests at once."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model-with-head")
    sizes = {"vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 512}
    make_checkpoint(folder, LlamaConfig(**TINY, **sizes, num_hidden_layers=3, num_attention_heads=4))
    return folder


def admission(slot: int, prompt: list[int], temperature: float, length: int) -> Admission:
    asked = Sampling(temperature, 1.0, 0, slot, 400, 0, b"")
    blocks = pack_int32(range(1 + slot * BLOCKS_PER_SLOT, 1 + (slot + 1) * BLOCKS_PER_SLOT))
    return Admission(slot, pack_int32(prompt), len(prompt), 0, blocks, asked, False, length)


def take(launched: Launched, runner: Runner, slots: list[int], outputs: dict[int, list[int]]) -> int:
    """Adds a step's tokens to the outputs; returns how many drafts were right."""
    launched.done.synchronize()
    runner.staging.give_back(launched.staging)
    row, width, right = launched.ring_row.tolist()[1:], launched.width, 0
    stride = width + (width > 1)
    for number, slot in enumerate(slots):
        tokens = [token for token in row[number * stride : number * stride + width] if token != NO_TOKEN]
        outputs[slot] += tokens
        right += max(0, len(tokens) - 1)
    return right


def drive(runner: Runner, drafts: list[int], temperature: float) -> tuple[dict[int, list[int]], int]:
    """Prompts in a step, more of them beside what decodes, then decode steps with these numbers of drafts."""
    texts = prompts(NUM)
    lengths = [len(text) + 20 + 5 * slot for slot, text in enumerate(texts)]
    outputs: dict[int, list[int]] = {slot: [] for slot in range(NUM)}
    right = step = 0
    first, last = list(range(NUM - 2)), list(range(NUM - 2, NUM))
    for admitted, decode in ((first, []), (last, first)):
        plan = BatchPlan(
            0, step, (), tuple(admission(slot, texts[slot], temperature, lengths[slot]) for slot in admitted),
            (), tuple(Chunk(slot, 0, len(texts[slot]), True) for slot in admitted), pack_int32(decode),
            drafts[step],
        )  # fmt: skip
        launched = runner.launch(plan)
        runner.catch_up()
        right += take(launched, runner, decode + admitted, outputs)
        step += 1
    everybody = list(range(NUM))
    plans = [
        BatchPlan(0, step + i, decode=pack_int32(everybody) if i == 0 else None, num_drafts=count)
        for i, count in enumerate(drafts[2:])
    ]
    flying: list[Launched] = []
    for plan in plans:  # two are in flight
        flying.append(runner.launch(plan))
        runner.catch_up()
        if len(flying) == 2:
            right += take(flying.pop(0), runner, everybody, outputs)
    for launched in flying:
        right += take(launched, runner, everybody, outputs)
    assert {slot: len(tokens) for slot, tokens in outputs.items()} == {
        slot: lengths[slot] - len(texts[slot]) for slot in outputs
    }, "each ends where it must, and none before"
    return outputs, right


@pytest.mark.parametrize("captured", ["beforehand", "late", "never"])
@pytest.mark.parametrize(("method", "num_drafts"), [("ngram", 1), ("ngram", 4), ("mtp", 1), ("mtp", 2)])
def test_tokens_are_the_models_whatever_is_drafted(
    folder: Path, method: str, num_drafts: int, captured: str
) -> None:
    device = CudaDevice(0)
    [runner] = cuda_runners(folder, device, 1, method, num_drafts)
    if captured == "beforehand":
        runner.prepare(1024)
    elif captured == "late":
        runner.prepare_late(1024)
    draw = random.Random(num_drafts)
    for drafts in ([num_drafts] * 90, [draw.choice([0, num_drafts // 2, num_drafts]) for _ in range(90)]):
        device.compute.run(runner.steps.begin)
        outputs, right = drive(runner, drafts, 0.0)
        assert_greedy(folder, [outputs[slot] for slot in range(NUM)])
        if method == "ngram":  # a random model repeats itself soon
            assert right
    assert runner.steps._slots.state.position[-1] == 0, "padding stays where it is"
    device.close()


@pytest.mark.parametrize(("method", "num_drafts"), [("ngram", 1), ("ngram", 4), ("mtp", 2)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_in_float32_it_is_the_same_tokens(
    folder: Path, method: str, num_drafts: int, temperature: float
) -> None:
    """Greedy or drawn, whatever shares a step: exactly those of plain steps."""
    device, outputs = CudaDevice(0), []
    runners: list[Runner] = []  # whose graphs share a pool: the first ones stay as long as the last
    for kind, number in (("", 0), (method, num_drafts)):
        runners += cuda_runners(folder, device, 1, kind, number, torch.float32)
        runners[-1].prepare(256)
        found, right = drive(runners[-1], [number] * 90, temperature)
        outputs.append(found)
    assert outputs[0] == outputs[1]
    assert right > 0 or method == "mtp" or temperature > 0, "drafts were right"
    device.close()


@pytest.mark.parametrize("method", ["ngram", "mtp"])
def test_what_is_drawn_is_what_is_drawn_without_drafts(folder: Path, method: str) -> None:
    """bfloat16: the first difference lies where two tokens are nearly alike."""
    device = CudaDevice(0)
    drawn, runners = [], []  # whose graphs share a pool: the first ones stay as long as the last
    for kind, num_drafts in (("", 0), (method, 2)):
        runners += cuda_runners(folder, device, 1, kind, num_drafts)
        runners[-1].prepare(1024)
        drawn.append(drive(runners[-1], [num_drafts] * 90, 1.0)[0])
    same = sum(drawn[0][slot] == drawn[1][slot] for slot in range(NUM))
    assert same >= NUM // 2, f"{same} of {NUM} outputs are the same"
    alike = [
        next((i for i, (a, b) in enumerate(zip(drawn[0][slot], drawn[1][slot], strict=True)) if a != b), None)
        for slot in range(NUM)
    ]
    texts = prompts(NUM)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
    for slot, place in enumerate(alike):
        if place is not None:
            known = texts[slot] + drawn[0][slot][:place]
            with torch.inference_mode():
                logits = model(torch.tensor([known], device="cuda")).logits[0, -1].float()
            assert logits.isfinite().all()
            assert_noise_is_close(logits, slot, len(known), drawn[0][slot][place], drawn[1][slot][place])
    device.close()


def assert_noise_is_close(logits: torch.Tensor, seed: int, position: int, one: int, other: int) -> None:
    """With the noise of this place, the two tokens' scores are nearly the same."""
    from tpworker.model.sampling import gumbel_noise

    ids = torch.tensor([one, other])
    noise = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), ids)[0]
    scores = logits[ids.cuda()].cpu() + noise
    assert abs(float(scores[0] - scores[1])) < MARGIN


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(("method", "num_drafts"), [("ngram", 4), ("mtp", 1)])
def test_a_runtime_chooses_how_many(folder: Path, method: str, num_drafts: int, num_ranks: int) -> None:
    gpus(num_ranks)
    options: dict[str, Any] = {
        "speculative_method": method, "num_speculative_tokens": num_drafts, "prefix_caching": False,
        "max_num_batched_tokens": 256, "dtype": "bfloat16",
    }  # fmt: skip

    async def main() -> tuple[list[list[int]], int]:
        async with start(folder, num_ranks, **options) as runtime:
            outputs = await asyncio.gather(
                *(
                    collect(runtime, prompt, temperature=0.0, max_tokens=60 + 7 * number)
                    for number, prompt in enumerate(prompts(20))
                )
            )
            return list(outputs), sum(runtime.stats().draft_tokens)

    outputs, drafts = asyncio.run(asyncio.wait_for(main(), 120))
    assert drafts > 0
    assert_greedy(folder, outputs)
