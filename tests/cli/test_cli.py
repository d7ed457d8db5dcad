"""The command line, as far as it goes without a runtime."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tpworker.observe.gpus
from tpworker import cli
from tpworker.config import RuntimeConfig
from tpworker.errors import ConfigError, InvalidRequest
from tpworker.kv_events_config import KvEventsConfig
from tpworker.runtime.settings import StepSizes
from tpworker.sampling_params import SamplingParams

ROOT = Path(__file__).parents[2]

#: FastDeploy's command line carries over, and people's scripts use the rest: a flag here is a promise.
FLAGS = {
    "--allowed-origins",
    "--api-key",
    "--api-key-file",
    "--ask",
    "--block-size",
    "--chat-template",
    "--config",
    "--device",
    "--dtype",
    "--enable-force-include-usage",
    "--enable-overlap-schedule",
    "--enable-sleep-mode",
    "--enable-weight-updates",
    "--gpu-memory-utilization",
    "--help",
    "--host",
    "--join-address",
    "--kv-cache-dtype",
    "--kv-events-config",
    "--load-format",
    "--log-format",
    "--log-level",
    "--log-prompts",
    "--lookahead",
    "--max-model-len",
    "--max-num-batched-tokens",
    "--max-num-seqs",
    "--max-queue",
    "--max-restarts",
    "--model",
    "--no-enable-overlap-schedule",
    "--no-log-requests",
    "--no-prefix-caching",
    "--num-speculative-tokens",
    "--otlp-endpoint",
    "--port",
    "--prompt-lookup-max",
    "--prompt-lookup-min",
    "--quantization",
    "--reasoning-parser",
    "--restart-window",
    "--root-path",
    "--scheduling-policy",
    "--seed",
    "--served-model-name",
    "--shutdown-timeout",
    "--speculative-config",
    "--speculative-method",
    "--ssl-certfile",
    "--ssl-keyfile",
    "--start-timeout",
    "--step-timeout",
    "--tensor-parallel-size",
    "--target-itl",
    "--target-ttft",
    "--tool-call-parser",
    "--trace",
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
    "--kv-cache-dtype",
    "--load-format",
    "--max-num-batched-tokens",
    "--max-num-seqs",
    "--max-model-len",
    "--model",
    "--quantization",
    "--speculative-method",
    "--tensor-parallel-size",
    "-h",
    "-tp",
}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpworker.observe.gpus, "count_gpus", lambda: 0)
    monkeypatch.delenv("TPWORKER_API_KEY", raising=False)


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
    assert (options.served_model_names, options.api_key, options.allowed_origins) == ((), None, ())
    assert (options.root_path, options.tls_files, options.shutdown_timeout) == ("", None, None)
    assert options.force_include_usage is False
    assert (options.enable_sleep_mode, options.enable_weight_updates) == (False, False)
    assert (options.tool_call_parser, options.reasoning_parser) == ("auto", "auto")


def test_every_option_gets_to_its_place() -> None:
    arguments = """
        --model m -tp 4 --device cpu --dtype bfloat16 --max-model-len 99 --load-format dummy --seed 5
        --max-num-seqs 8 --max-num-batched-tokens 80 --lookahead 3 --block-size 32
        --gpu-memory-utilization 0.5 --no-prefix-caching --max-queue 7 --step-timeout 1.5 --start-timeout 90
        --max-restarts 3 --restart-window 60.5 --join-address my-group.1
        --scheduling-policy priority --host 0.0.0.0 --port 81 --served-model-name name other name
        --api-key key
        --root-path /llm/ --shutdown-timeout 2.5 --enable-force-include-usage --chat-template t.jinja
        --tool-call-parser hermes --reasoning-parser qwen3 --enable-sleep-mode --enable-weight-updates
        --speculative-method ngram --num-speculative-tokens 3 --prompt-lookup-max 6 --prompt-lookup-min 3
        --quantization fp8 --kv-cache-dtype fp8 --target-itl 0.02 --target-ttft 2.5
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
        quantization="fp8",
        kv_cache_dtype="fp8",
        target_itl=0.02,
        target_ttft=2.5,
        gpu_memory_utilization=0.5,
        prefix_caching=False,
        scheduling_policy="priority",
        max_queue=7,
        step_timeout=1.5,
        start_timeout=90.0,
        max_restarts=3,
        restart_window=60.5,
        join_address="my-group.1",
        chat_template="t.jinja",
        speculative_method="ngram",
        num_speculative_tokens=3,
        prompt_lookup_max=6,
        prompt_lookup_min=3,
    )
    assert (options.host, options.port) == ("0.0.0.0", 81)
    assert (options.served_model_names, options.api_key) == (("name", "other"), "key")
    assert (options.root_path, options.shutdown_timeout) == ("/llm", 2.5)
    assert options.force_include_usage is True
    assert (options.enable_sleep_mode, options.enable_weight_updates) == (True, True)
    assert (options.tool_call_parser, options.reasoning_parser) == ("hermes", "qwen3")


def test_the_options_of_the_doctor() -> None:
    arguments = "doctor -tp 4 --model m --device cuda --max-model-len 99 --json"
    options = cli.parse(arguments.split())
    config = RuntimeConfig(model="m", tensor_parallel_size=4, device="cuda", max_model_len=99)
    assert options == cli.DoctorOptions(config, as_json=True)
    assert cli.parse(["doctor"]) == cli.DoctorOptions(RuntimeConfig(tensor_parallel_size=2), as_json=False)
    memory = (
        "--max-num-seqs 8 --max-num-batched-tokens 80 --block-size 32 --gpu-memory-utilization 0.5 "
        "--speculative-method ngram"
    )
    options = cli.parse(["doctor", "--model", "m", *memory.split()])
    config = RuntimeConfig(
        model="m",
        tensor_parallel_size=2,
        max_num_seqs=8,
        max_num_batched_tokens=80,
        block_size=32,
        gpu_memory_utilization=0.5,
        speculative_method="ngram",
    )
    assert options == cli.DoctorOptions(config, as_json=False)
    for option, value in (("--dtype", "float16"), ("--block-size", "32"), ("--speculative-method", "mtp")):
        with pytest.raises(ConfigError, match=f"{option} has no effect without --model"):
            cli.parse(["doctor", option, value])
    assert cli.main(["doctor", "--model", "m", "--max-num-seqs", "0"]) == 2


def test_the_key_may_stand_in_a_file_or_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    monkeypatch.setenv("TPWORKER_API_KEY", "from the environment")
    assert parse().api_key == "from the environment"
    assert parse("--api-key", "given").api_key == "given"
    assert parse("--ask", "Hi").api_key is None
    for content in ("sk-1 2", "sk-1 2\n", "sk-1 2\r\n", "\ufeffsk-1 2\r\n"):
        file.write_text(content)
        assert parse("--api-key-file", str(file)).api_key == "sk-1 2"
    assert parse("--api-key", "kéy").api_key == "kéy"


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("", "must not be empty"),
        ("a\nb", "U+000A"),
        ("\x7f", "U+007F"),
        ("a\x00", "U+0000"),
        ("a\x85b", "U+0085"),
        (" a", "begins or ends with a space"),
        ("a\t", "begins or ends with a space"),
        ("a\u20acb", "character 2 of the key is U+20AC"),
        ("x" * 5000, "5000 characters or more; the limit is 4096"),
    ],
)
def test_a_key_that_no_header_carries_is_refused_without_showing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        parse("--api-key", key)
    errors = [str(caught.value)]
    if "\x00" not in key:
        monkeypatch.setitem(os.environ, "TPWORKER_API_KEY", key)
        with pytest.raises(ConfigError, match=re.escape(words)) as caught:
            parse()
        errors.append(str(caught.value))
    for error in errors:
        assert "\n" not in error
        assert len(key) < 3 or key.strip() not in error


def test_a_file_without_a_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "key"
    for content, words in (
        (b"", "must not be empty"),
        (b"\n", "must not be empty"),
        (b"a\nb\n", "has 2 lines"),
    ):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            parse("--api-key-file", str(file))
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        parse("--api-key-file", str(file))
    for path, words in (
        (str(tmp_path / "none"), "No such file"),
        (str(tmp_path), "Is a directory"),
        ("", "Is a directory"),
        ("a\x00b", "cannot be read"),
        ("/dev/zero", "limit is"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse("--api-key-file", path)
    with pytest.raises(ConfigError, match="both given"):
        parse("--api-key", "a", "--api-key-file", str(file))


def test_a_key_that_is_no_text_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^word 3 on the command line is not UTF-8, and must be$"):
        parse("--api-key", "secret\udcff")
    monkeypatch.setitem(os.environ, "TPWORKER_API_KEY", "secret\udcff")
    with pytest.raises(ConfigError, match=r"^TPWORKER_API_KEY: character 7 of the key is U[+]DCFF, which "):
        parse()


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "a\u2028", "\u202e", " a", "\x00"])
def test_a_name_that_nobody_can_write_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--served-model-name") as caught:
        parse("--served-model-name", name)
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()


def test_names_of_all_languages_are_taken() -> None:
    for name in ("org/model", "模型 1", "modèle"):
        assert parse("--served-model-name", name).served_model_names == (name,)


def test_origins() -> None:
    two = ("https://a.example", "http://localhost:3000")
    assert parse("--allowed-origins", *two).allowed_origins == two
    assert parse("--allowed-origins", " ".join(two)).allowed_origins == two
    assert parse("--allowed-origins", json.dumps(two)).allowed_origins == two
    own = ("http://[::1]:8000", "chrome-extension://abc", "null")
    assert parse("--allowed-origins", *own).allowed_origins == own
    assert parse("--allowed-origins", "*", "--port", "1").allowed_origins == ("*",)
    assert parse("--allowed-origins", '["*"]').allowed_origins == ("*",)
    assert parse().allowed_origins == ()
    for wrong in (
        "https://a.example/",
        "a.example",
        "https://*.example",
        "https://A.example",
        "http://[::1",
        "https://a.example:99999",
        "[1]",
        "[",
        "[]",
    ):
        with pytest.raises(ConfigError, match="--allowed-origins"):
            parse("--allowed-origins", wrong)
    with pytest.raises(ConfigError, match="has no origin"):
        parse("--allowed-origins", "")


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
        ("--max-restarts 0 --restart-window 9", "--restart-window has no effect with --max-restarts 0"),
        ("--ask Hi --port 8001", "--port has no effect with --ask"),
        ("--ask Hi --host 0.0.0.0", "--host has no effect"),
        ("--ask Hi --api-key k", "--api-key has no effect"),
        ("--ask Hi --served-model-name n", "--served-model-name has no effect"),
        ("--ask Hi --max-queue 5", "--max-queue has no effect"),
        ("--ask Hi --scheduling-policy priority", "--scheduling-policy has no effect"),
        ("--port 70000", "--port 70000"),
        ("--port -1", "--port -1"),
        ("--ask Hi --api-key-file f", "--api-key-file has no effect"),
        ("--ask Hi --allowed-origins *", "--allowed-origins has no effect"),
        ("--api-key=", "must not be empty"),
        ("--served-model-name=", "must not be empty"),
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


@pytest.mark.parametrize(
    "arguments", ["", "serve --max-num-seqs", "serve --port x", "serve --device tpu", "sing"]
)
def test_what_argparse_finds_is_status_2(capsys: pytest.CaptureFixture[str], arguments: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments.split())
    assert caught.value.code == 2
    assert "usage: tpworker" in capsys.readouterr().err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that is said of a command line that cannot be."""
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("tpworker: error: ")
    assert error.count("\n") == 1
    return error.removeprefix("tpworker: error: ").rstrip()


def test_a_model_may_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("some/model").config.model == "some/model"
    assert parse("some/model", "-tp", "4").config == RuntimeConfig(model="some/model", tensor_parallel_size=4)
    options = cli.parse(["doctor", "some/model", "--json"])
    assert options.config.model == "some/model"
    assert refused(capsys, "serve", "a/b", "--model", "c/d") == (
        "a model is named twice, 'a/b' and by '--model': leave out one"
    )
    assert "named twice" in refused(capsys, "serve", "a/b", "--port", "1", "--model=c/d")
    assert refused(capsys, "serve", "") == refused(capsys, "serve", "--model", "")


# ------------------------------------------------------------------------------------ odd values


def test_slots_and_tokens_of_a_step_that_do_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "serve", "--max-num-seqs=600", "--max-num-batched-tokens=32")
    assert error.startswith("max_num_seqs=600 is more than max_num_batched_tokens=32")
    assert error.endswith("raise max_num_batched_tokens to 600 or more, or lower max_num_seqs to 32 or less")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_help_names_the_step_sizes_of_each_device(capsys: pytest.CaptureFixture[str], device: str) -> None:
    with pytest.raises(SystemExit):
        cli.parse(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    place = {"cpu": "on the CPU", "cuda": "on GPUs"}[device]
    sizes = StepSizes.of(RuntimeConfig(), device)
    for size in (sizes.max_num_seqs, sizes.max_num_batched_tokens):
        assert f"{size} {place}" in text


@pytest.mark.parametrize("host", ["", "a..b", "x" * 64, "http://localhost", "0.0.0.0:80", "a\nb", "::g"])
def test_hosts_that_cannot_be(capsys: pytest.CaptureFixture[str], host: str) -> None:
    error = refused(capsys, "serve", "--host", host)
    assert error.startswith(f"--host {host!r}: must be an IP address or a name")


@pytest.mark.parametrize(
    ("host", "meant"),
    [
        ("::1", "::1"),
        ("[::1]", "::1"),
        ("::", "::"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("localhost", "localhost"),
    ],
)
def test_hosts_that_can_be(host: str, meant: str) -> None:
    assert parse("--host", host).host == meant


NUMBERS = ["--gpu-memory-utilization", "--step-timeout", "--start-timeout", "--restart-window"]


@pytest.mark.parametrize("flag", NUMBERS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "9" * 5000])
def test_numbers_that_are_none(capsys: pytest.CaptureFixture[str], flag: str, value: str) -> None:
    error = refused(capsys, "serve", f"{flag}={value}")
    assert error.startswith(f"{flag.removeprefix('--').replace('-', '_')}={float(value)}: must be ")


@pytest.mark.parametrize(
    "flag",
    ["--seed", "--port", "--max-num-seqs", "--max-queue", "-tp", "--max-model-len", "--max-restarts"],
)
@pytest.mark.parametrize("digits", [30, 4000, 5000])
def test_integers_of_any_length(capsys: pytest.CaptureFixture[str], flag: str, digits: int) -> None:
    """Python itself reads and writes none of more than 4,300 digits."""
    try:
        status = cli.main(["serve", flag, "9" * digits])
    except SystemExit as exit:
        status = exit.code  # type: ignore[assignment]
    assert status == 2
    error = capsys.readouterr().err
    assert "must be " in error
    assert len(error) < 300


def test_an_embedder_may_write_any_integer_too() -> None:
    with pytest.raises(ConfigError, match=r"seed=a number of thousands of digits: must be from 0 to"):
        RuntimeConfig(seed=10**5000)
    with pytest.raises(InvalidRequest, match=r"top_k=a number of thousands of digits: must be an integer"):
        SamplingParams(top_k=10**5000)


@pytest.mark.parametrize("arguments", [["serve", "--help"], ["doctor", "-tp", "64", "--device", "cuda"]])
def test_a_terminal_that_knows_ascii_only(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tpworker", *arguments],
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.stderr == b""
    assert b"\\u2026" in done.stdout or b"\\u2192" in done.stdout


def test_what_is_no_utf_8(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--model", "/tmp/\udcff"], ["--ask", "\udcff"], ["--host", "\udcff"], ["\udcff"]):
        assert refused(capsys, "serve", *arguments).endswith("on the command line is not UTF-8, and must be")
    with pytest.raises(ConfigError, match="in UTF-8"):
        RuntimeConfig(model="/tmp/\udcff")


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


@pytest.mark.parametrize(
    ("command", "number", "status", "words"),
    [
        (["serve"], signal.SIGTERM, 0, "tpworker: SIGTERM: ended before it was ready"),
        (["serve"], signal.SIGHUP, 0, "tpworker: SIGHUP: ended before it was ready"),
        (["serve"], signal.SIGINT, 0, "tpworker: SIGINT: ended before it was ready"),
        (["serve", "--ask", "Hi"], signal.SIGINT, 130, ""),
        (["serve", "--ask=Hi"], signal.SIGTERM, 143, ""),
        (["doctor"], signal.SIGHUP, 129, ""),
    ],
)
def test_a_signal_before_anything_watches_for_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    number: signal.Signals,
    status: int,
    words: str,
) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    monkeypatch.setattr(cli, "parse", lambda words: signal.raise_signal(number))
    assert cli.main(command) == status
    assert capsys.readouterr().err.strip() == words
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)] == before


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"top_k": 2**40}, r"top_k=1099511627776: must be an integer from 0 to 2\*\*31 - 1"),
        ({"min_tokens": 2**70}, r"min_tokens=.*: must be an integer from 0 to 2\*\*31 - 1"),
        (
            {"stop_token_ids": [-1]},
            r"stop_token_ids=\(-1,\): .* 16 token ids, integers from 0 on",
        ),
    ],
)
def test_a_refusal_names_the_bound_that_was_broken(option: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        SamplingParams(**option)


def test_kv_events_are_told_of_in_vllms_words() -> None:
    asked = '{"enable_kv_cache_events": true, "publisher": "zmq", "topic": "kv", "buffer_steps": 5}'
    config = parse("--kv-events-config", asked).config.kv_events_config
    assert config == KvEventsConfig(
        enable_kv_cache_events=True, publisher="zmq", topic="kv", buffer_steps=5, endpoint="tcp://*:5557"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{}", "--ask", "Hi"], "--kv-events-config has no effect with --ask"),
        (["{"], "is no JSON"),
        (["[]"], "must be a JSON object"),
        (['{"endpoints": 5}'], r"kv_events_config: KvEventsConfig has no endpoints: is endpoint meant\?"),
        (['{"endpoint": "udp://*:5"}'], "kv_events_config: endpoint='udp://.*': must be tcp://HOST:PORT or"),
        (['{"hwm": 0}'], "kv_events_config: hwm=0: must be an integer from 1 to"),
        (['{"topic": 5}'], "kv_events_config: topic=5: must be a string"),
        (['{"replay_endpoint": "tcp://*:5557"}'], "must be another one than endpoint"),
        (
            ['{"enable_kv_cache_events": true}', "--no-prefix-caching"],
            "has no effect with prefix_caching=False",
        ),
    ],
)
def test_kv_events_that_cannot_be(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises((ConfigError, SystemExit)) as error:
        parse("--kv-events-config", *arguments)
    assert re.search(said, f"{error.value}{capsys.readouterr().err}")
