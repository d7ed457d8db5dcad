"""Ranks without a model, as processes: `Runtime(fake_model(folder), **FAKE_RANKS)`.

Loop, barrier, staging, slot bookkeeping and publisher are a rank's own. Only the device is not: every step
takes the same time there, on a clock of its own (fake_device.py), and does nothing but write its row of the
token ring. What remains is what tpworker itself costs the host, and whether it keeps a device fed.

Every token is its step's number, modulo the vocabulary. There is no tokenizer: prompts are token ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tpworker.ipc.child import RankBoot, run_child
from tpworker.rank.process import run_rank
from tpworker.rank.runner import Runner, _Step
from tpworker.testing.fake_device import FakeDevice

FAKE_RANKS: dict[str, Any] = {
    "rank_module": "tpworker.testing.fake_process",
    "device": "cpu",
    "load_format": "dummy",
}
"""Options of `Runtime` that go with a fake model."""

_STEP_SECONDS = "tpworker_step_seconds"  # a key of config.json that no model has


def fake_model(
    folder: Path, *, step_seconds: float = 0.001, max_model_len: int = 16384, vocab_size: int = 32000
) -> Path:
    """Writes what stands in the place of a model's folder, and returns it.

    Args:
        folder: made if need be.
        step_seconds: how long every step takes.
        max_model_len, vocab_size: of the model that it seems to be. It has no end-of-sequence token.
    """
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab_size,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": max_model_len,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "eos_token_id": None,  # without a word it would be Llama's usual one
        _STEP_SECONDS: step_seconds,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class FakeRunner(Runner):
    """Stages steps as any runner does; on the device they write their row of the token ring, no more."""

    def _run(self, step: _Step) -> None:
        row = self.sampler.ring_row(step.number, step.num_sampled).numpy()
        row[0] = step.number
        row[1:] = step.number % self.steps.decoder.spec.vocab_size


def main(boot: RankBoot) -> None:
    """What the process does."""
    config = json.loads((Path(boot.model) / "config.json").read_text())
    run_rank(boot, FakeDevice(config[_STEP_SECONDS]), FakeRunner)


if __name__ == "__main__":
    run_child(RankBoot, main)
