"""What the command line says of the HTTP server: files of TLS, paths, names, times."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.test_cli import parse
from tpworker import ConfigError


def test_files_of_tls_that_fit(tmp_path: Path, tls_folder: Path) -> None:
    cert, key = str(tls_folder / "one.crt"), str(tls_folder / "one.key")
    assert parse("--ssl-certfile", cert, "--ssl-keyfile", key).tls_files == (cert, key)
    both = tmp_path / "both.pem"
    both.write_text((tls_folder / "one.key").read_text() + (tls_folder / "one.crt").read_text())
    assert parse("--ssl-certfile", str(both)).tls_files == (str(both), None)


@pytest.mark.parametrize(
    ("cert", "key", "words"),
    [
        ("one.crt", "other.key", "no certificate and the key that belongs to it"),
        ("one.key", "one.key", "no certificate and the key that belongs to it"),
        ("one.crt", None, "no certificate and the key that belongs to it"),
        ("one.crt", "one.crt", "no certificate and the key that belongs to it"),
        ("one.crt", "encrypted.key", "is encrypted: take off its password"),
        ("missing.crt", "one.key", "--ssl-certfile .*missing.crt' cannot be read: No such file"),
        ("one.crt", "missing.key", "--ssl-keyfile .*missing.key' cannot be read: No such file"),
        ("one.crt", ".", "--ssl-keyfile .* cannot be read: Is a directory"),
        (None, "one.key", "--ssl-keyfile has no effect without --ssl-certfile"),
    ],
)
def test_files_of_tls_that_do_not_fit(
    tls_folder: Path, cert: str | None, key: str | None, words: str
) -> None:
    arguments = [] if cert is None else ["--ssl-certfile", str(tls_folder / cert)]
    arguments += [] if key is None else ["--ssl-keyfile", str(tls_folder / key)]
    with pytest.raises(ConfigError, match=words):
        parse(*arguments)


def test_a_key_that_nobody_may_read(tmp_path: Path, tls_folder: Path) -> None:
    key = tmp_path / "nul\0key"
    with pytest.raises(ConfigError, match="--ssl-keyfile"):
        parse("--ssl-certfile", str(tls_folder / "one.crt"), f"--ssl-keyfile={key}")


@pytest.mark.parametrize(("path", "root"), [("/llm", "/llm"), ("/a/b-c_1/", "/a/b-c_1"), ("/", ""), ("", "")])
def test_root_paths(path: str, root: str) -> None:
    assert parse("--root-path", path).root_path == root


@pytest.mark.parametrize(
    "path", ["llm", "//llm", "/a//b", "/a b", "/a?b", "/a%20", "https://a/b", "/é", "/a\n"]
)
def test_paths_that_are_none(path: str) -> None:
    with pytest.raises(ConfigError, match="--root-path"):
        parse("--root-path", path)


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "86401"])
def test_times_that_cannot_be(seconds: str) -> None:
    with pytest.raises(ConfigError, match="--shutdown-timeout"):
        parse(f"--shutdown-timeout={seconds}")


def test_a_name_is_taken_once() -> None:
    assert parse("--served-model-name", "b", "a", "b").served_model_names == ("b", "a")
    with pytest.raises(ConfigError, match="--served-model-name must not be empty"):
        parse("--served-model-name", "a", "")


@pytest.mark.parametrize(
    "arguments",
    [
        "--root-path /a",
        "--ssl-certfile {folder}/one.crt",
        "--shutdown-timeout 3",
        "--enable-force-include-usage",
        "--enable-sleep-mode",
        "--enable-weight-updates",
        "--tool-call-parser none",
        "--reasoning-parser qwen3",
    ],
)
def test_options_of_the_server_have_no_effect_with_ask(tls_folder: Path, arguments: str) -> None:
    arguments = arguments.format(folder=tls_folder)
    flag = arguments.split()[0]
    with pytest.raises(ConfigError, match=f"{flag} has no effect with --ask"):
        parse("--ask", "Hi", *arguments.split())


@pytest.mark.parametrize("flag", ["--tool-call-parser", "--reasoning-parser"])
def test_formats_that_nobody_knows(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    with pytest.raises(SystemExit):
        parse(flag, "klingon")
    error = capsys.readouterr().err
    assert f"argument {flag}: invalid choice: 'klingon'" in error
    assert "'none'" in error
