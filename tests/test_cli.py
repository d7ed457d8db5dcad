"""The command line, as far as it goes without a runtime."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tpworker.observe.gpus
from tpworker import cli
from tpworker.config import RuntimeConfig
from tpworker.errors import ConfigError

ROOT = Path(__file__).parents[1]

#: FastDeploy's command line carries over, and people's scripts use the rest: a flag here is a promise.
FLAGS = {
    "--api-key",
    "--ask",
    "--block-size",
    "--device",
    "--dtype",
    "--enable-overlap-schedule",
    "--gpu-memory-utilization",
    "--help",
    "--host",
    "--load-format",
    "--lookahead",
    "--max-model-len",
    "--max-num-batched-tokens",
    "--max-num-seqs",
    "--max-queue",
    "--model",
    "--no-enable-overlap-schedule",
    "--no-prefix-caching",
    "--port",
    "--seed",
    "--served-model-name",
    "--start-timeout",
    "--step-timeout",
    "--tensor-parallel-size",
    "-h",
    "-tp",
}
DOCTOR_FLAGS = {
    "--block-size",
    "--device",
    "--dtype",
    "--gpu-memory-utilization",
    "--help",
    "--json",
    "--load-format",
    "--max-num-batched-tokens",
    "--max-num-seqs",
    "--max-model-len",
    "--model",
    "--tensor-parallel-size",
    "-h",
    "-tp",
}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpworker.observe.gpus, "count_gpus", lambda: 0)


def parse(*arguments: str) -> cli.Options:
    options = cli.parse(["serve", *arguments])
    assert isinstance(options, cli.Options)
    return options


def help_text(capsys: pytest.CaptureFixture[str], command: str = "serve") -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_the_flags_are_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(capsys).partition("options:")[2]
    assert set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*(?=[\s,])", text)) - {"--no-"} == FLAGS
    text = help_text(capsys, "doctor").partition("options:")[2]
    assert set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*(?=[\s,])", text)) == DOCTOR_FLAGS


def test_every_flag_is_explained_and_the_defaults_are_the_configs(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(help_text(capsys).split())
    for field in dataclasses.fields(RuntimeConfig):
        flag = f"--{field.name.replace('_', '-')}"
        if flag in FLAGS and type(field.default) in (int, float) and field.name != "tensor_parallel_size":
            assert re.search(rf"{flag} [A-Z]+ [^(]+\(default: {field.default}\)", text), flag
    embedders = {field.name for field in dataclasses.fields(RuntimeConfig)} - {
        flag.removeprefix("--").removeprefix("no-").replace("-", "_") for flag in FLAGS
    }
    assert embedders == {"num_kv_blocks", "check_ranks_agree"}, "as RuntimeConfig's docstring has it"
    assert re.search(r"--tensor-parallel-size N, -tp N [^(]+\(default: 1 if there is a GPU, else 2\)", text)


def test_without_arguments_it_is_the_default_model_at_tp_2_on_the_cpu() -> None:
    options = parse()
    assert options.config == RuntimeConfig(tensor_parallel_size=2)
    assert (options.host, options.port, options.ask) == ("127.0.0.1", 8000, None)
    assert (options.served_model_name, options.api_key) == (None, None)


def test_every_option_gets_to_its_place() -> None:
    arguments = """
        --model m -tp 4 --device cpu --dtype bfloat16 --max-model-len 99 --load-format dummy --seed 5
        --max-num-seqs 8 --max-num-batched-tokens 80 --lookahead 3 --block-size 32
        --gpu-memory-utilization 0.5 --no-prefix-caching --max-queue 7 --step-timeout 1.5 --start-timeout 90
        --host 0.0.0.0 --port 81 --served-model-name name --api-key key
    """
    options = parse(*arguments.split())
    assert options.config == RuntimeConfig(
        model="m",
        tensor_parallel_size=4,
        device="cpu",
        dtype="bfloat16",
        max_model_len=99,
        load_format="dummy",
        seed=5,
        max_num_seqs=8,
        max_num_batched_tokens=80,
        lookahead=3,
        block_size=32,
        gpu_memory_utilization=0.5,
        prefix_caching=False,
        max_queue=7,
        step_timeout=1.5,
        start_timeout=90.0,
    )
    assert (options.host, options.port) == ("0.0.0.0", 81)
    assert (options.served_model_name, options.api_key) == ("name", "key")


def test_the_options_of_the_doctor() -> None:
    arguments = "doctor -tp 4 --model m --device cuda --max-model-len 99 --json"
    options = cli.parse(arguments.split())
    config = RuntimeConfig(model="m", tensor_parallel_size=4, device="cuda", max_model_len=99)
    assert options == cli.DoctorOptions(config, as_json=True)
    assert cli.parse(["doctor"]) == cli.DoctorOptions(RuntimeConfig(tensor_parallel_size=2), as_json=False)
    memory = "--max-num-seqs 8 --max-num-batched-tokens 80 --block-size 32 --gpu-memory-utilization 0.5"
    options = cli.parse(["doctor", "--model", "m", *memory.split()])
    config = RuntimeConfig(
        model="m",
        tensor_parallel_size=2,
        max_num_seqs=8,
        max_num_batched_tokens=80,
        block_size=32,
        gpu_memory_utilization=0.5,
    )
    assert options == cli.DoctorOptions(config, as_json=False)
    for option, value in (("--dtype", "float16"), ("--block-size", "32")):
        with pytest.raises(ConfigError, match=f"{option} has no effect without --model"):
            cli.parse(["doctor", option, value])
    assert cli.main(["doctor", "--model", "m", "--max-num-seqs", "0"]) == 2


def test_overlap_is_lookahead() -> None:
    assert parse().config.lookahead == 2
    assert parse("--enable-overlap-schedule").config.lookahead == 2
    assert parse("--enable-overlap-schedule", "--lookahead", "4").config.lookahead == 4
    assert parse("--no-enable-overlap-schedule").config.lookahead == 0
    assert parse("--no-enable-overlap-schedule", "--lookahead", "0").config.lookahead == 0
    assert parse("--lookahead", "0").config.lookahead == 0


@pytest.mark.parametrize(
    ("num_gpus", "arguments", "size"),
    [
        (0, "", 2),
        (0, "--device cpu", 2),
        (4, "", 1),
        (4, "--device cpu", 2),
        (0, "--device cuda", 1),
        (4, "-tp 4", 4),
    ],
)
def test_the_default_number_of_ranks(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int, arguments: str, size: int
) -> None:
    monkeypatch.setattr(tpworker.observe.gpus, "count_gpus", lambda: num_gpus)
    assert parse(*arguments.split()).config.tensor_parallel_size == size


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--no-enable-overlap-schedule --lookahead 2", "--lookahead 2 has no effect"),
        ("--enable-overlap-schedule --lookahead 0", "--lookahead 0 switches off"),
        ("--ask Hi --port 8001", "--port has no effect with --ask"),
        ("--ask Hi --host 0.0.0.0", "--host has no effect"),
        ("--ask Hi --api-key k", "--api-key has no effect"),
        ("--ask Hi --served-model-name n", "--served-model-name has no effect"),
        ("--ask Hi --max-queue 5", "--max-queue has no effect"),
        ("--port 70000", "--port 70000"),
        ("--port -1", "--port -1"),
        ("--api-key=", "must not be empty"),
        ("--ask=", "must not be empty"),
        ("--model=", "model='': must be a folder"),
        ("--max-num-seqs 0", "max_num_seqs=0"),
        ("--block-size 17", "power of two"),
        ("--lookahead 99", "from 0 to 16"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse(*arguments.split())
    assert cli.main(["serve", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tpworker: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", ["", "serve --max-num", "serve --port x", "serve --device tpu", "sing"])
def test_what_argparse_finds_is_status_2(capsys: pytest.CaptureFixture[str], arguments: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments.split())
    assert caught.value.code == 2
    assert "usage: tpworker" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("serve some/model", "(use --model some/model)"),
        ("doctor some/model -tp 2", "(use --model some/model)"),
        ("serve --tp 4", "(use -tp or --tensor-parallel-size)"),
        ("serve --tensor-parallel=4", "(use -tp or --tensor-parallel-size)"),
    ],
)
def test_what_other_command_lines_have_is_hinted_at(
    capsys: pytest.CaptureFixture[str], arguments: str, hint: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments.split())
    assert caught.value.code == 2
    assert hint in capsys.readouterr().err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    setup = (ROOT / "setup.cfg").read_text()
    assert f"version = {capsys.readouterr().out.removeprefix('tpworker ').strip()}\n" in setup


def test_a_mistake_is_told_in_an_instant() -> None:
    program = (
        "import sys; from tpworker.cli import main\n"
        "assert main(['serve', '--max-num-seqs', '0']) == 2\n"
        "unwanted = 'torch', 'transformers', 'numpy', 'fastapi', 'uvicorn', 'rich', 'zmq'\n"
        "print([name for name in unwanted if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_import_tpworker_needs_nothing() -> None:
    program = (
        "import sys, tpworker; tpworker.Runtime; tpworker.SamplingParams\n"
        "unwanted = 'torch', 'transformers', 'fastapi', 'uvicorn', 'starlette', 'prometheus_client'\n"
        "print([name for name in unwanted if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
