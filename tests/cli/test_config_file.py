"""Options in a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.test_cli import parse
from tpworker import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "serve.yaml"


def test_all_kinds_of_options(file: Path) -> None:
    file.write_text(
        """
        model: a/b
        port: 81
        tensor_parallel_size: 4      # underscores, as in RuntimeConfig
        gpu-memory-utilization: 0.5
        no-prefix-caching: true
        enable-overlap-schedule: false
        enable-force-include-usage: false
        served-model-name: [one, two]
        tool-call-parser: none
        reasoning_parser: glm45
        allowed-origins: https://a.example
        api-key: -starts-with-a-dash
        host:
        """
    )
    options = parse("--config", str(file))
    config = options.config
    assert (config.model, config.tensor_parallel_size, config.lookahead) == ("a/b", 4, 0)
    assert (config.gpu_memory_utilization, config.prefix_caching) == (0.5, False)
    assert (options.port, options.host, options.api_key) == (81, "127.0.0.1", "-starts-with-a-dash")
    assert options.served_model_names == ("one", "two")
    assert (options.tool_call_parser, options.reasoning_parser) == ("none", "glm45")
    assert (options.allowed_origins, options.force_include_usage) == (("https://a.example",), False)


def test_the_command_line_counts_more(file: Path) -> None:
    file.write_text("port: 81\nmodel: a\nserved-model-name: b\nmax-queue: 3\n")
    options = parse("other", "--port", "82", f"--config={file}", "--served-model-name", "c")
    assert (options.port, options.config.model, options.served_model_names) == (82, "other", ("c",))
    assert options.config.max_queue == 3


@pytest.mark.parametrize("key", ["0123", "1_000", "1:30", "0x10", "1.50", "1e+3", "-7", "'0123'"])
def test_a_text_of_digits_is_as_it_is_written(file: Path, key: str) -> None:
    """YAML would read the first as 83: clients that send 0123 would be turned away."""
    file.write_text(f"api-key: {key}\n")
    assert parse("--config", str(file)).api_key == key.strip("'")


def test_numbers_are_read_as_on_the_command_line(file: Path) -> None:
    file.write_text("port: 0081\ngpu-memory-utilization: .5\n")
    options = parse("--config", str(file))
    assert (options.port, options.config.gpu_memory_utilization) == (81, 0.5)


@pytest.mark.parametrize("text", ["", "---\n", "# nothing\n", "{}"])
def test_nothing_is_nothing(file: Path, text: str) -> None:
    file.write_text(text)
    assert parse("--config", str(file)) == parse()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot: 8000", "'--prot': no such option; is --port meant"),
        ("tp: 2\nrevision: main", "--tp: the name here is -tp .*; --revision: not supported"),
        ("json: true", "--json: an option of `tpworker doctor` alone"),
        ("config: other.yaml", "config: it has no place here"),
        ("help: true", "help: it has no place here"),
        ("port: true", "port: True must be a string or a number"),
        ("port: [1, 2]", r"port: \[1, 2\] must be a string or a number$"),
        ("served-model-name: [1]", "must be a string or a number, or a list of strings"),
        ("served-model-name: []", "must be a string or a number, or a list of strings"),
        ("served-model-name: [a, --port]", "'--port' must not begin with a dash"),
        ("no-prefix-caching: 1", "no-prefix-caching: 1 must be true or false"),
        ("- port", "it must hold options by their names"),
        ("1: 2", "it must hold options by their names"),
        ("just words", "it must hold options by their names"),
        ("port: 1\nport: 2", "port is there twice"),
        ("max-queue: 1\nmax_queue: 2", "max-queue is there twice"),
        ("a: [", "is no YAML that can be read: while parsing"),
        ("a: !!python/object:os.system {}", "is no YAML that can be read: could not determine a constructor"),
        ("a: " + "[" * 5000, "is no YAML that can be read"),
        ("host: 2020-01-01", "host: datetime.date.* must be a string or a number"),
        ("max-queue: 0", "max_queue=0: must be from 1"),
    ],
)
def test_what_is_wrong_is_named(file: Path, text: str, words: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        parse("--config", str(file))
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value) or text == "max-queue: 0"


def test_what_argparse_finds_names_the_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("port: many")
    with pytest.raises(SystemExit):
        parse("--config", str(file))
    assert f"{file}: argument --port: 'many' must be a whole number" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["missing", "a folder", "endless", "no text"])
def test_files_that_cannot_be_read(file: Path, kind: str) -> None:
    if kind == "no text":
        file.write_bytes(b"\xff\xfe\xff")
    name = {"a folder": str(file.parent), "endless": "/dev/zero"}.get(kind, str(file))
    with pytest.raises(ConfigError, match=f"--config '?{name}"):
        parse("--config", name)


def test_a_file_that_is_written_as_yaml_does_it(file: Path) -> None:
    options: dict[str, Any] = {"host": "::", "root-path": "/llm", "step-timeout": 1.5, "max-restarts": 0}
    file.write_text(yaml.safe_dump(options))
    parsed = parse("--config", str(file))
    assert (parsed.host, parsed.root_path) == ("::", "/llm")
    assert (parsed.config.step_timeout, parsed.config.max_restarts) == (1.5, 0)
