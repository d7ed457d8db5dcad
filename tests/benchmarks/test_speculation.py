"""The benchmarks of speculation, as far as they need no GPU: a small model, a head that learns from it."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.speculation import acceptance, distill
from benchmarks.speculation.agreement import Agreement, _count, judge
from benchmarks.speculation.head_files import merge, read_head, save_head
from benchmarks.speculation.outputs import Outputs, Tongue, complete, lengths_of
from benchmarks.speculation.plain_llama import Cache, Head, Llama
from benchmarks.speculation.replay import LookUp, Repeats, replay
from benchmarks.speculation.seeds import draw_prompts
from benchmarks.speculation.texts import KINDS, read_prompts
from tests.conftest import TINY_CONFIG
from tpworker.kernels.operands import SlotState
from tpworker.model.ngram import look_up as define

CONFIG = TINY_CONFIG | {"tie_word_embeddings": True, "max_position_embeddings": 4096}
ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
TEMPLATE = (
    "{% for m in messages %}<u>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are small, and threads that wait for each other on busy cores take minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    with torch.no_grad():  # so that something is likelier than the rest
        model.model.embed_tokens.weight *= 20
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    alphabet = ["<u>", "<a>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(alphabet[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.fixture
def model(folder: Path) -> Llama:
    return Llama.read(folder, CPU, torch.float32)


def drawing() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_plain_llama_is_transformers(folder: Path, model: Llama) -> None:
    tokens = torch.randint(0, 300, (3, 20), generator=drawing())
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        assert torch.allclose(model.logits(model(tokens)), expected, atol=1e-4)
        caches = [Cache.empty(model.sizes, 3, 20, model.lm_head.weight) for _ in model.layers]
        rows = [model.logits(model.decode(tokens[:, i], caches, i)) for i in range(20)]
    assert torch.allclose(torch.stack(rows, dim=1), expected, atol=1e-4)


def test_texts_go_on_behind_prompts_of_different_lengths(model: Llama) -> None:
    prompts = [[5, 6, 7], [8] * 9, [9] * 40]
    texts = complete(model, prompts, 30, [0.0, 0.0, 0.0], drawing())
    assert texts.prompt_lengths.tolist() == [3, 9, 30]
    for row, prompt in enumerate(prompts):
        kept = texts.tokens[row, : len(prompt)].tolist()
        assert kept == prompt[:30]
    with torch.inference_mode():
        hidden = model(texts.tokens)
    assert torch.allclose(texts.hidden, hidden, atol=1e-4), "hidden states are those of the tokens there"
    likeliest = model.logits(hidden).argmax(dim=-1)
    for row, length in enumerate((3, 9)):
        assert torch.equal(texts.tokens[row, length:], likeliest[row, length - 1 : -1])
    warm = complete(model, [[5, 6, 7]] * 50, 30, [5.0] * 50, drawing())
    assert len({tuple(row) for row in warm.tokens.tolist()}) > 40
    assert lengths_of(
        Outputs(torch.tensor([[2, 3, 2, 4], [2, 3, 4, 4]]), hidden, torch.tensor([1, 1])), 2
    ) == [3, 4]


def test_prompts_to_learn_from_are_none_of_those_to_judge_by(folder: Path) -> None:
    tongue = Tongue(folder)
    passages = ["A passage with a {} in it."]
    asked = set(draw_prompts(random.Random(0), 3000, passages))
    assert len(asked) > 500
    assert None in asked, "a conversation that has not begun"
    assert any(passages[0] in text for text in asked if text)
    judged = [prompt for kind in KINDS for prompt in read_prompts(kind)]
    assert len(judged) == 24
    assert not asked & set(judged)
    alone = draw_prompts(random.Random(0), 200, [])
    assert not any(passages[0] in text for text in alone if text)
    said = [tongue.text(tokens) for tokens in tongue.chat(["Why?", None])]
    assert said == ["Why?", ""]
    assert [len(tokens) for tokens in tongue.chat(["Why?", None])] == [6, 1], "the answer has its mark"


def options_of(**changed: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    distill.add_options(parser)
    options = parser.parse_args(["--quick"])
    vars(options).update(json=None, **changed)
    return options


@pytest.fixture(scope="module")
def learnt(folder: Path) -> tuple[Head, list[float]]:
    """A head that has learnt from nothing, and the losses of its rounds.

    Time is counted in steps here, so that it is the same on any machine.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, steps = Llama.read(folder, CPU, torch.float32), iter(range(10**6))
    head = Head(model.sizes)
    options = options_of(rate=3e-3)
    return head, distill.train(model, head, Tongue(folder), options, drawing(), lambda: next(steps) / 200)


def test_a_head_learns(
    folder: Path, model: Llama, learnt: tuple[Head, list[float]], capsys: pytest.CaptureFixture[str]
) -> None:
    tongue, (head, losses) = Tongue(folder), learnt
    assert losses[-1] < 0.5 * losses[0]
    none, after, beginning = (
        judge(model, each, tongue, 200, drawing(), is_quick=True)
        for each in (Head(model.sizes), head, Head.beginning(model))
    )
    assert right_of(after) > right_of(none) + 0.3
    assert right_of(beginning) > right_of(none) + 0.1
    assert all(each.coupled == each.likeliest == each.apart for each in after if each.temperature == 0)
    assert sum(each.positions for each in after) > 100
    distill.print_table(after)
    assert f"{100 * after[-1].apart:.1f}" in capsys.readouterr().out


def test_a_head_is_served_as_it_was_judged(
    folder: Path, model: Llama, learnt: tuple[Head, list[float]], tmp_path: Path
) -> None:
    """What is fed to it, and in which order, is the same there."""
    save_head(learnt[0], tmp_path / "head.safetensors")
    merge(folder, tmp_path / "head.safetensors", tmp_path / "both")
    head = read_head(tmp_path / "head.safetensors", model.sizes)
    tongue = Tongue(folder)
    prompts = tongue.chat(read_prompts("chat"))
    length = max(map(len, prompts)) + 40
    outputs = complete(model, prompts, length, [0.0] * len(prompts), drawing())
    with torch.inference_mode():
        drafts = model.logits(head(model.embed_tokens(outputs.tokens[:, 1:]), outputs.hidden[:, :-1])).argmax(
            -1
        )
    right = sum(
        int((drafts[row, given - 1 : given + 38] == outputs.tokens[row, given + 1 : given + 40]).sum())
        for row, given in enumerate(map(len, prompts))
    )
    options = ["--model", str(tmp_path / "both"), "--method", "mtp", "--measured", "1", "--temperature", "0"]
    file = tmp_path / "acceptance.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "acceptance",
        *options,
        "--max-tokens",
        "40",
        "--json",
        str(file),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    [found] = json.loads(file.read_text())["measured"]
    assert found["chat 0.0"]["acceptance"][0] == pytest.approx(right / (39 * len(prompts)), abs=0.1)


def right_of(found: list[Agreement]) -> float:
    """Share of coupled drafts, over all outputs that there are."""
    return sum(each.positions * each.coupled for each in found) / sum(each.positions for each in found)


def test_coupled_drafts_are_right_more_often_than_others() -> None:
    """Of two distributions that are equal, all of them; a sample of its own rarely is."""
    logits = torch.randn(2000, 50, generator=drawing())
    coupled, likeliest, apart = (_count(logits, logits.clone(), 1.0, drawing()) / 2000).tolist()
    assert coupled == 1
    assert apart < likeliest < 0.5
    assert (_count(logits, logits.clone(), 0.0, drawing()) == 2000).all()


def test_a_head_beside_its_model(folder: Path, model: Llama, tmp_path: Path) -> None:
    head = Head.beginning(model)
    save_head(head, tmp_path / "head.safetensors")
    again = read_head(tmp_path / "head.safetensors", model.sizes)
    assert torch.equal(again.fc.weight, head.fc.weight.bfloat16().float())
    assert (
        distill.run(options_of(model=folder, merge=tmp_path / "head.safetensors", out=tmp_path / "both")) == 0
    )
    weights = load_file(tmp_path / "both/model.safetensors")
    assert weights["mtp.fc.weight"].shape == (32, 64)
    assert "mtp.layers.0.self_attn.q_proj.weight" in weights
    assert torch.equal(
        weights["model.norm.weight"], load_file(folder / "model.safetensors")["model.norm.weight"]
    )
    assert json.loads((tmp_path / "both/config.json").read_text())["num_nextn_predict_layers"] == 1
    assert Tongue(tmp_path / "both").chat(["a"]) == Tongue(folder).chat(["a"])
    save_file({"mtp.fc.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no head of"):
        merge(folder, tmp_path / "other.safetensors", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"merge": Path("x")}, "--merge and --out belong together"),
        ({"model": Path("/nonexistent")}, "config.json"),
    ],
)
def test_what_cannot_be_is_told(
    changed: dict[str, object], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill.run(options_of(**changed)) == 2
    assert told in capsys.readouterr().err


# --------------------------------------------------------------------------------------- acceptance


@pytest.mark.parametrize("look_up", [LookUp(1, 1), LookUp(2, 2), LookUp(4, 2), LookUp(8, 3)])
def test_a_replay_drafts_what_the_model_would(look_up: LookUp) -> None:
    draw = random.Random(str(look_up))
    for alphabet in (2, 3, 12):
        sequence = [draw.randrange(alphabet) for _ in range(60)]
        repeats = Repeats(look_up)
        for stand, token in enumerate(sequence):
            repeats.append(token)
            state = SlotState(
                last_token=torch.tensor([token]),
                position=torch.tensor([stand]),
                end=torch.tensor([100]),
                most_drafts=torch.tensor([5]),
                drafts=torch.full((1, 5), -1),
                history=torch.tensor([sequence], dtype=torch.int32),
                block_table=torch.zeros(1, 1, dtype=torch.int32),
            )
            define(torch.tensor([0]), 5, *look_up, state)
            expected = [draft for draft in state.drafts[0].tolist() if draft >= 0]
            assert repeats.drafts(5) == expected, (sequence[: stand + 1], look_up)


def test_steps_that_are_replayed() -> None:
    """A copy: behind its first two tokens everything is known; at its end a step has room for one token."""
    prompt, output = [*range(10, 20), 5], [*range(10, 18)]
    tally = replay(prompt, output, LookUp(4, 2), 3)
    assert (tally.tokens, tally.steps, tally.drafted) == (7, 3, 2)  # 11 │ 12 13 14 15 │ 16 17
    assert tally.drafts == {0: 2, 1: 2, 2: 2}
    assert tally.accepted == {0: 2, 1: 1, 2: 1}
    assert tally.acceptance == [1, 0.5, 1]
    assert tally.precision == 4 / 6
    assert tally.tokens_a_step == 7 / 3
    tally += replay([1, 2, 3], [4, 5, 6], LookUp(4, 2), 3)
    assert (tally.tokens, tally.steps, tally.drafted) == (9, 5, 2)
    wrong = replay([1, 2, 9, 7], [1, 2, 8, 8], LookUp(2, 2), 2)
    assert (wrong.steps, wrong.drafted, wrong.acceptance) == (3, 1, [0, 0])
    assert replay([1], [2], LookUp(2, 2), 2).steps == 0


def test_acceptance_through_a_runtime(folder: Path, tmp_path: Path) -> None:
    """The small model repeats itself: look-ups are right, as often as a replay says."""
    options = ["--model", str(folder), "--prompts", "2", "--max-tokens", "30", "--temperature", "0", "0.7"]
    settings = ["--drafts", "1", "3", "--look-ups", "2/1", "--shown", "3/2", "--measured", "3", "--auto"]
    command = [sys.executable, "-m", "benchmarks", "acceptance", *options, *settings]
    command += ["--json", str(tmp_path / "acceptance.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "3 drafts: 0 outputs differ" in done.stdout
    assert "3 (replayed)" in done.stdout
    written = json.loads((tmp_path / "acceptance.json").read_text())
    assert [(each["look_up"], each["drafts"]) for each in written["replayed"]] == [
        ("2/1", 1), ("2/1", 3), ("3/2", 1), ("3/2", 3),
    ]  # fmt: skip
    fixed, auto = written["measured"]
    assert (fixed["drafts"], auto["drafts"], fixed["differ"], auto["differ"]) == ("3", "auto", 0, 0)
    expected = written["replayed"][-1]
    for group in ("copying 0.0", "code 0.7", "chat 0.0", "all all"):
        assert fixed[group]["tokens_a_step"] == pytest.approx(expected[group]["tokens_a_step"])
    assert expected["all all"]["tokens_a_step"] > 1.2


@pytest.mark.parametrize("text", ["4", "2/3", "0/0", "a/b", "4/2/1"])
def test_lengths_of_n_grams_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no MAX/MIN"):
        acceptance.look_up(text)


def test_runs_that_no_runtime_has_together_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    acceptance.add_options(parser)
    assert acceptance.run(parser.parse_args(["--model", "/nonexistent", "--measured", "1", "3", "8"])) == 2
    assert "up to 8 drafts they have 1, 2, 4, 8, not 3" in capsys.readouterr().err
