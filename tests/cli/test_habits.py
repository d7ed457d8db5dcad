"""What a command line of another engine is answered, and words that belong to no option."""

from __future__ import annotations

import re

import pytest

from tests.cli.test_cli import DOCTOR_FLAGS, FLAGS, refused
from tpworker.cli import habits, parse
from tpworker.cli.habit_values import VALUES


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--enable-memory-saver", "--enable-memory-saver: the name here is --enable-sleep-mode"),
        ("--tp 4", "--tp: the name here is -tp or --tensor-parallel-size"),
        ("--tensor-parallel=4", "--tensor-parallel: the name here is -tp or --tensor-parallel-size"),
        ("--max_model_len 5", "--max_model_len: the name here is --max-model-len"),
        ("--max-batch-size 5", "--max-batch-size: the name here is --max-num-seqs"),
        ("--context-length=5", "--context-length: the name here is --max-model-len"),
        ("--model-path a/b", "--model-path: the name here is --model"),
        (
            "--enable-prefix-caching",
            "--enable-prefix-caching: always on (--no-prefix-caching switches it off",
        ),
        ("--enable-chunked-prefill", "--enable-chunked-prefill: always on"),
        ("--trust-remote-code", "--trust-remote-code: not needed: no code of a model's folder is ever run"),
        ("--quantization-param-path x", "--quantization-param-path: not supported: weights are in float32"),
        ("-q fp8", "-q: the name here is --quantization"),
        ("--tokenizer some/where", "--tokenizer: not supported: it is read from the model's folder"),
        (
            "--schedule-policy lpm",
            "--schedule-policy: the name here is --scheduling-policy, fcfs or priority",
        ),
        (
            "--enable-priority-scheduling",
            "--enable-priority-scheduling: the name here is --scheduling-policy",
        ),
        ("--enable-auto-tool-choice", "--enable-auto-tool-choice: always on, for requests with tools"),
        ("--enable-fault-tolerance", "--enable-fault-tolerance: always on (--max-restarts 0 switches"),
        ("--migration-limit 3", "--migration-limit: the name here is --max-restarts"),
        ("--timeout-graceful-shutdown 3", "--timeout-graceful-shutdown: the name here is --shutdown-timeout"),
        ("--grammar-backend x", "--grammar-backend: not needed: llguidance"),
        ("-pp 2", "-pp: not supported yet: tensor parallelism (-tp)"),
        ("--enforce-eager", "--enforce-eager: not needed: steps on GPUs are always graph replays"),
        ("--disable-log-requests", "--disable-log-requests: the name here is --no-log-requests"),
        ("--enable-log-requests", "--enable-log-requests: always on (--no-log-requests switches it off"),
        ("--uvicorn-log-level info", "--uvicorn-log-level: the name here is --log-level"),
        ("--disable-uvicorn-access-log", "--disable-uvicorn-access-log: not needed: probes and pages are"),
        ("--max-log-len 100", "--max-log-len: the name here is --log-prompts CHARS"),
        ("--hf-overrides.a.b 1", "--hf-overrides.a.b: not supported: it is read from the model's folder"),
        ("--num-kv-blocks 5", "--num-kv-blocks: not an option: a field of RuntimeConfig"),
        ("--json", "--json: an option of `tpworker doctor` alone: leave it out"),
        ("--max-num-seq 5", "'--max-num-seq': no such option; is --max-num-seqs meant?"),
        ("--frobnicate", "'--frobnicate': no such option; `tpworker serve --help` lists all"),
        (
            "--data-parallel-rpc-port 5",
            "--data-parallel-rpc-port: not supported yet: tensor parallelism (-tp)",
        ),
        ("-dpl 2", "-dpl: not supported yet: tensor parallelism (-tp)"),
        ("--mm-processor-cache-gb 4", "--mm-processor-cache-gb: not supported: models of text only"),
        ("--no-enforce-eager", "--no-enforce-eager: not needed: steps on GPUs are always graph replays"),
        ("--hicache-ratio 2", "--hicache-ratio: not supported: weights and KV cache stay on the device"),
        ("--tokenizer-revision a", "--tokenizer-revision: not supported: it is read from the model's folder"),
        ("--logits-processors a.b", "--logits-processors: not supported: no code but tpworker's own runs"),
        ("--swap-space 4", "--swap-space: not needed: a request that is preempted is computed again"),
        ("--lora-modules a=b c=d", "--lora-modules: not supported yet: merge the adapter into the weights"),
    ],
)
def test_what_other_engines_have_is_answered_by_what_holds_here(
    capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    error = refused(capsys, "serve", *arguments.split())
    assert error.startswith(said)
    assert ";" not in error.removeprefix(said) or "no such option" in said, "the values are no news"


def test_all_that_is_wrong_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "a/b --tp 2 --enable-prefix-caching --port 5 --tp 4 --cpu-offload-gb 1"
    error = refused(capsys, "serve", *arguments.split())
    assert [one.partition(":")[0] for one in error.split("; ") if one.startswith("--")] == [
        "--tp", "--enable-prefix-caching", "--cpu-offload-gb",
    ]  # fmt: skip
    assert refused(capsys, "doctor", "a/b", "--port", "80") == (
        "--port: an option of `tpworker serve` alone: leave it out"
    )


def test_the_table_of_habits_names_what_there_is() -> None:
    assert not (habits.NAMES.keys() | habits.FACTS.keys()) & (FLAGS | DOCTOR_FLAGS)
    assert not habits.NAMES.keys() & habits.FACTS.keys()
    values = [said for values in VALUES.values() for said in values.values()]
    told = " ".join([*habits.NAMES.values(), *habits.FACTS.values(), *habits.FAMILIES, *values])
    told += " ".join([*habits.COMMANDS.values(), *VALUES])
    told = told.replace("hf download NAME --revision", "")
    assert set(re.findall(r"--[a-z][a-z-]*", told)) <= FLAGS


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            "--host a b",
            "'b': --host takes one value, and one with spaces needs quotes",
        ),
        ("--model b --host=a b", "'b': --host takes one value"),
        ("--host b b", "'b': --host takes one value"),
        ("--max-num-seqs 4 8 --port 1", "'8': --max-num-seqs takes one value"),
        ("--no-prefix-caching a/b", "'a/b': belongs to no option; a model is named first, or with --model"),
        ("a/b c/d", "'c/d': --model takes one value"),
    ],
)
def test_words_that_belong_to_no_option(
    capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    assert refused(capsys, "serve", *arguments.split()).startswith(said)


def test_no_family_takes_what_there_is_and_each_has_its_members() -> None:
    beginnings = [one for family in habits.FAMILIES.values() for one in family]
    assert len(set(beginnings)) == len(beginnings)
    for flag in FLAGS | DOCTOR_FLAGS:
        assert flag in SHARED or not flag.startswith(tuple(beginnings)), flag


SHARED = {"--speculative-config", "--speculative-method"}
"""Their family is of what they do not have."""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("serve --dtype half", "argument --dtype: 'half': its name here is float16"),
        ("serve --dtype fp8", "argument --dtype: 'fp8': not supported: weights are in float32"),
        ("serve --quantization fp8_e4m3", "argument --quantization: 'fp8_e4m3': its name here is fp8"),
        ("serve --dtype x", "argument --dtype: invalid choice: 'x' (choose from"),
        (
            "serve --kv-cache-dtype fp8_e5m2",
            "argument --kv-cache-dtype: 'fp8_e5m2': not supported: fp8 is E4M3",
        ),
        ("serve --device gpu", "argument --device: 'gpu': its name here is cuda"),
        ("serve --load-format safetensors", "argument --load-format: 'safetensors': that is auto"),
        ("serve --speculative-method eagle", "argument --speculative-method: 'eagle': not supported: drafts"),
        ("serve --tool-call-parser qwen25", "argument --tool-call-parser: 'qwen25': its name here is hermes"),
        ("org/model --port 80", "'org/model' is no command (serve, doctor"),
        ("vllm serve org/model", "'vllm' is no command"),
        ("chat", "a model: `tpworker serve MODEL`; `tpworker serve MODEL --ask TEXT` answers once"),
    ],
)
def test_values_and_commands_of_others_are_answered_too(
    capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    with pytest.raises(SystemExit):
        parse(words.split())
    assert said in capsys.readouterr().err
    values = {flag: set(values) for flag, values in VALUES.items()}
    for flag, others in values.items():
        for value in others:
            with pytest.raises(SystemExit):
                parse(["serve", flag, value])
