"""Drafts on the command line: the single options, and --speculative-config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_cli import parse, refused
from tpworker import ConfigError, RuntimeConfig


def with_config(**settings: Any) -> RuntimeConfig:
    return parse("--speculative-config", json.dumps(settings)).config


def test_both_forms_say_the_same() -> None:
    single = (
        "--speculative-method ngram --num-speculative-tokens 4 --prompt-lookup-max 5 --prompt-lookup-min=3"
    )
    config = RuntimeConfig(
        tensor_parallel_size=2,
        speculative_method="ngram",
        num_speculative_tokens=4,
        prompt_lookup_max=5,
        prompt_lookup_min=3,
    )
    assert parse(*single.split()).config == config
    settings = {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_max": 5,
        "prompt_lookup_min": 3,
    }
    assert with_config(**settings) == config
    assert with_config(method="ngram", num_speculative_tokens=None).num_speculative_tokens is None


@pytest.mark.parametrize(
    "name", ["mtp", "MTP", "deepseek_mtp", "glm4_moe_mtp", "ernie_mtp", "qwen3_next_mtp", "nextn"]
)
def test_whatever_a_models_own_head_is_called(name: str) -> None:
    config = with_config(method=name, num_speculative_tokens=1)
    assert (config.speculative_method, config.num_speculative_tokens) == ("mtp", 1)


@pytest.mark.parametrize("name", ["draft_model", "eagle", "eagle3", "medusa", "suffix", "unheard_of_mtp"])
def test_what_else_drafts_elsewhere_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"method '{name}' is not supported: drafts come from n-grams "):
        with_config(method=name, num_speculative_tokens=3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "ngram",
            r"--speculative-config 'ngram': must be a JSON object, as --speculative-config '\{\"method\"",
        ),
        ("[1]", r"'\[1\]': must be a JSON object"),
        ("{", "must be a JSON object"),
        ("[" * 100_000, "must be a JSON object"),
        ('{"num_speculative_tokens": 4}', "it has no method; drafts come from n-grams"),
        ('{"method": "magic"}', "method 'magic': must be ngram or mtp"),
        ('{"method": 5}', "method 5: must be ngram or mtp"),
        ('{"method": "ngram", "num_speculative_tokens": "4"}', "num_speculative_tokens '4': must be a whole"),
        (
            '{"method": "ngram", "num_speculative_tokens": true}',
            "num_speculative_tokens True: must be a whole",
        ),
        ('{"method": "ngram", "prompt_lookup_max": 2.5}', r"prompt_lookup_max 2\.5: must be a whole number"),
        ('{"method": "ngram", "magic": 1}', "'magic': no such key; there are method, num_speculative_tokens"),
        ('{"method": "ngram", "model": "a/b"}', "'model': a second model cannot draft: drafts come from"),
        ('{"decoding_type": "MTP"}', "'decoding_type': the key here is method"),
        ('{"method": "mtp", "method": "ngram"}', "'method' is there twice"),
        ('{"method": "ngram", "num_speculative_tokens": 9}', "num_speculative_tokens=9: must be from 1 to 8"),
        ('{"method": "mtp", "prompt_lookup_max": 4}', "prompt_lookup_max=4 has no effect with spec"),
    ],
)
def test_what_is_wrong_is_said(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        parse("--speculative-config", text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "option",
    [
        "--speculative-method mtp",
        "--num-speculative-tokens 2",
        "--prompt-lookup-max 2",
        "--prompt-lookup-min 2",
    ],
)
def test_one_form_at_a_time(option: str) -> None:
    flag = option.partition(" ")[0]
    with pytest.raises(ConfigError, match=f"--speculative-config and {flag} are both given"):
        parse("--speculative-config", '{"method": "ngram"}', *option.split())


def test_a_method_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--speculative-method", "eagle")
    told = capsys.readouterr().err
    assert "'eagle': not supported" in told
    assert all(f"--speculative-method {name}" in told for name in ("ngram", "mtp"))


def test_options_without_a_method_have_no_effect() -> None:
    with pytest.raises(
        ConfigError, match="num_speculative_tokens=2 has no effect without speculative_method"
    ):
        parse("--num-speculative-tokens", "2")


@pytest.mark.parametrize(
    "lines",
    [
        'speculative-config: \'{"method": "ngram", "num_speculative_tokens": 3}\'',
        "speculative_config:\n  method: ngram\n  num_speculative_tokens: 3",
        "speculative-method: ngram\nnum-speculative-tokens: 3",
    ],
)
def test_in_a_file(tmp_path: Path, lines: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(lines + "\n")
    config = parse("--config", str(file)).config
    assert (config.speculative_method, config.num_speculative_tokens) == ("ngram", 3)


def test_what_is_no_number_in_a_file_is_said(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("speculative-config:\n  method: ngram\n  num_speculative_tokens: 2001-01-01\n")
    with pytest.raises(ConfigError, match="num_speculative_tokens '2001-01-01': must be a whole number"):
        parse("--config", str(file))
    file.write_text("speculative-config: [1]\n")
    with pytest.raises(ConfigError, match=r"speculative-config: \[1\] must be"):
        parse("--config", str(file))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            "--speculative-algorithm NGRAM",
            "the name here is --speculative-method, ngram (NGRAM) or mtp (NEXTN)",
        ),
        ("--speculative-num-draft-tokens 8", "the name here is --num-speculative-tokens, one less"),
        ("--speculative-eagle-topk 4", "not needed: drafts are a sequence"),
        ("--speculative-draft-model-path a/b", "not supported: drafts come from n-grams"),
        ("--speculative-model a/b", "not supported: drafts come from n-grams"),
        ("--speculative-ngram-max-match-window-size 4", "the name here is --prompt-lookup-max"),
        ("--extra-llm-api-options f.yaml", "not an option: --config FILE"),
    ],
)
def test_habits_of_other_engines(capsys: pytest.CaptureFixture[str], arguments: str, said: str) -> None:
    flag = arguments.partition(" ")[0]
    assert refused(capsys, "serve", *arguments.split()).startswith(f"{flag}: {said}")
