"""Whether the Python packages are here that a group needs, and recent enough. None of them is imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from typing import NamedTuple

from tpworker.doctor.check import Check, missing, ok, warning


class Package(NamedTuple):
    """A requirement of setup.cfg."""

    name: str
    least: tuple[int, ...] = ()
    extra: str = ""
    """Of its own, that is to be installed with it."""


REQUIRED = (
    Package("torch", (2, 11)),
    Package("numpy"),
    Package("pyzmq", (26,)),
    Package("msgpack", (1, 0)),
    Package("nvidia-ml-py", (12,)),
    Package("setproctitle", (1, 3)),
    Package("transformers", (5,)),
    Package("tokenizers", (0, 21)),
    Package("llguidance", (1, 9)),
    Package("jinja2", (3, 1, 6)),
    Package("safetensors", (0, 5)),
    Package("huggingface_hub", (1, 0)),
    Package("rich", (13,)),
    Package("pyyaml", (6,)),
)
METRICS = (Package("prometheus-client", (0, 20)),)
SERVER = (
    Package("fastapi", (0, 115)),
    Package("uvicorn", (0, 30)),
    *METRICS,
)
DEFAULT_MODEL = (Package("gguf", (0, 17)),)
OTLP = (Package("opentelemetry-sdk", (1, 30)), Package("opentelemetry-exporter-otlp-proto-http", (1, 30)))
RAY = (Package("ray", (2, 60), "serve"),)


def check_libraries(device: str, is_default_model: bool) -> Iterator[Check]:
    """One line a package that is missing or too old, and one for those that are as they should be."""
    good: list[str] = []
    for package in REQUIRED:
        found = _version(package)
        if found is None or not _is_recent(found, package):
            yield missing(package.name, _state(found, package), f"pip install '{_requirement(package)}'")
        else:
            good.append(f"{package.name} {found}")
    optional: dict[str, tuple[tuple[Package, ...], str]] = {"server": (SERVER, "no HTTP server without it")}
    if is_default_model:
        optional["default-model"] = (
            DEFAULT_MODEL,
            "the default model, where it is not here yet, cannot be converted",
        )
    for extra, wanted, effect in (
        ("otlp", OTLP, "no --otlp-endpoint without it"),
        ("ray", RAY, "no tpworker.integrations.ray without it"),
    ):
        if any(map(_version, wanted)):  # whoever has none of it, does not want it
            optional[extra] = wanted, effect
    for extra, (packages, effect) in optional.items():
        for package in packages:
            found = _version(package)
            if found is None or not _is_recent(found, package):
                remedy = f"pip install 'tpworker[{extra}]'"
                yield warning(package.name, f"{_state(found, package)}: {effect}", remedy)
            else:
                good.append(f"{package.name} {found}")
    yield ok("libraries", ", ".join(good))
    if device == "cuda":
        yield _triton()


def _triton() -> Check:
    """It comes with torch's builds for CUDA; its name differs between builds, so its module is looked for."""
    if importlib.util.find_spec("triton") is None:
        return missing(
            "triton", "not installed: the kernels of CUDA ranks are written in it", "pip install triton"
        )
    return ok("triton", next((v for v in map(_raw_version, ("triton", "pytorch-triton")) if v), "installed"))


def check_flash_attention(capability: tuple[int, int] | None) -> Check:
    """FlashAttention 3, on a GPU of this compute capability."""
    subject = "FlashAttention 3"
    if capability is not None and capability != (9, 0):
        return warning(
            subject,
            f"is made for compute capability 9.0, this GPU has {_dotted(capability)}: prompts are slow",
            "take a Hopper GPU (H100, H200) for fast prompts",
        )
    if importlib.util.find_spec("flash_attn_interface") is None:
        return warning(
            subject,
            "not installed: prompts are slow, and wait for the device",
            "pip install 'tpworker[cuda]'",
        )
    return ok(subject, _raw_version("tokenspeed-fa3") or "installed")


def check_cuda_versions(built_for: tuple[int, int] | None, driver: tuple[int, int] | None) -> Check:
    """Whether the driver runs the CUDA that torch was built for."""
    subject = "CUDA"
    if built_for is None:
        return missing(
            subject,
            "the torch that is installed is its CPU build",
            "install one for CUDA (https://pytorch.org), or use --device cpu",
        )
    told = f"torch is built for {_dotted(built_for)}"
    if driver is None:
        return warning(subject, f"{told}; the driver does not tell what it runs", "update the NVIDIA driver")
    found = f"{told}, the driver runs up to {_dotted(driver)}"
    if driver[0] < built_for[0]:
        remedy = f"update the NVIDIA driver, or install a torch for CUDA {driver[0]}"
        return missing(subject, found, remedy)
    if driver < built_for:
        remedy = "update the NVIDIA driver if a kernel cannot be loaded"
        return warning(subject, f"{found}: minor versions are compatible, but for some kernels", remedy)
    return ok(subject, found)


def _raw_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _version(package: Package) -> str | None:
    return _raw_version(package.name)


def _is_recent(version: str, package: Package) -> bool:
    numbers = tuple(int(number) for number in re.match(r"[\d.]*", version)[0].strip(".").split(".") if number)  # type: ignore[index]
    return numbers >= package.least


def _state(found: str | None, package: Package) -> str:
    return "not installed" if found is None else f"{found} is too old, {_dotted(package.least)} is needed"


def _requirement(package: Package) -> str:
    name = f"{package.name}[{package.extra}]" if package.extra else package.name
    return f"{name}>={_dotted(package.least)}" if package.least else name


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
