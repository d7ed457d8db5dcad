"""What the command line says, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tpworker.cli.parser import DEFAULT_HOST, DEFAULT_PORT, make_parser
from tpworker.config import RuntimeConfig
from tpworker.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """What the command line says, checked."""

    config: RuntimeConfig
    host: str
    port: int
    served_model_name: str | None
    api_key: str | None
    ask: str | None


@dataclass(frozen=True)
class DoctorOptions:
    """What the command line of `tpworker doctor` says, checked."""

    config: RuntimeConfig
    as_json: bool


def parse(arguments: Sequence[str] | None = None) -> Options | DoctorOptions:
    """Read the command line.

    Raises:
        ConfigError: a value out of range, or an option that has no effect beside the others.
        SystemExit: what argparse itself finds, or --help.
    """
    parser = make_parser()
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_hint(unknown[0])}")
    given = vars(known)
    command = given.pop("command")
    given.setdefault("tensor_parallel_size", _default_tensor_parallel_size(given.get("device", "auto")))
    return _doctor_options(given) if command == "doctor" else _serve_options(given)


def _hint(unknown: str) -> str:
    """What somebody may have meant who knows other command lines."""
    if not unknown.startswith("-"):
        return f" (use --model {unknown})"
    if unknown.partition("=")[0] in ("--tp", "--tp-size", "--tensor-parallel"):
        return " (use -tp or --tensor-parallel-size)"
    return ""


def _doctor_options(given: dict[str, Any]) -> DoctorOptions:
    as_json = given.pop("json", False)
    for name in given:
        if "model" not in given and name not in ("device", "tensor_parallel_size"):
            raise ConfigError(f"--{name.replace('_', '-')} has no effect without --model: leave it out")
    return DoctorOptions(RuntimeConfig(**given), as_json)


def _serve_options(given: dict[str, Any]) -> Options:
    lookahead = _lookahead(given.pop("enable_overlap_schedule", None), given.get("lookahead"))
    if lookahead is not None:
        given["lookahead"] = lookahead
    serving = {
        name: given.pop(name) for name in ("host", "port", "served_model_name", "api_key") if name in given
    }
    ask = given.pop("ask", None)
    if ask is not None:
        for name in [*serving, *({"max_queue"} & given.keys())]:
            raise ConfigError(
                f"--{name.replace('_', '-')} has no effect with --ask, which serves nobody: leave it out"
            )
    if not 0 <= serving.get("port", DEFAULT_PORT) <= 65535:
        raise ConfigError(f"--port {serving['port']}: must be from 0 (any that is free) to 65535")
    if "" in (serving.get("api_key"), serving.get("served_model_name"), ask):
        raise ConfigError("--api-key, --served-model-name and --ask must not be empty: leave them out")
    return Options(
        RuntimeConfig(**given),
        serving.get("host", DEFAULT_HOST),
        serving.get("port", DEFAULT_PORT),
        serving.get("served_model_name"),
        serving.get("api_key"),
        ask,
    )


def _lookahead(overlap: bool | None, lookahead: int | None) -> int | None:
    if overlap is False and lookahead:
        raise ConfigError(
            f"--lookahead {lookahead} has no effect with --no-enable-overlap-schedule: leave out one"
        )
    if overlap is True and lookahead == 0:
        raise ConfigError(
            "--lookahead 0 switches off what --enable-overlap-schedule switches on: leave out one"
        )
    return 0 if overlap is False else lookahead


def _default_tensor_parallel_size(device: str) -> int:
    """2 on the CPU, where a rank costs little; on GPUs 1, for each rank takes a whole one."""
    from tpworker.observe.gpus import count_gpus

    return 2 if device == "cpu" or (device == "auto" and not count_gpus()) else 1
