"""What the runtime process itself needs of a model: its folder, its facts, its tokenizer. No weights."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tpworker.config import RuntimeConfig
from tpworker.errors import ConfigError, ModelError, one_line, shown

if TYPE_CHECKING:
    from tpworker.model.families import ModelSpec
    from tpworker.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Progress = Callable[[str, float | None], None]
T = TypeVar("T")

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_SHORT_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_LONGEST_LINE = 1000


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model on this machine."""

    folder: Path  # absolute
    spec: ModelSpec
    name: str  # what to call it towards clients

    def with_tokenizer(self, tokenizer: Tokenizer) -> FoundModel:
        """The model as its tokenizer ends its outputs, too. Raises ModelError if too many tokens do."""
        spec = self.spec.ended_by(tokenizer.eos_id)
        if not spec.eos_ids:
            logger.warning(
                "%s names no end-of-sequence token (eos_token_id in generation_config.json or config.json, "
                "eos_token in tokenizer_config.json): outputs end by length, or where a request says",
                self.folder,
            )
        return replace(self, spec=spec)


def find_model(config: RuntimeConfig, progress: Progress, *, check_weights: bool = True) -> FoundModel:
    """Finds the model of a configuration, downloading it if need be, and reads all but its tensors.

    Args:
        check_weights: whether the ranks are such as read the weights, unless these are dummies.

    Raises:
        ConfigError: the working directory is gone.
        ModelError: there is no such model, or it cannot be served.
    """
    check_working_directory()
    from tpworker.checkpoint.resolve import resolve_model
    from tpworker.model.families import read_spec

    folder = resolve_model(config.model, progress, weights=config.load_format != "dummy").absolute()
    spec = read_spec(folder)
    for line in what_is_odd(folder, spec, check_weights and config.load_format != "dummy"):
        logger.warning("%s", line)
    check_tokenizer_files(folder)
    return FoundModel(folder, spec, config.model or folder.name)


def what_is_odd(folder: Path, spec: ModelSpec, check_weights: bool) -> list[str]:
    """What a user should know of a model that can be served, a line each.

    Raises:
        ModelError: it cannot be served: its weights are missing, cut off, or were never written.
    """
    from tpworker.checkpoint.weight_files import check_files

    odd = list(spec.notes)
    if spec.generation_ignored:
        ignored = ", ".join(f"{name}={shown(value)}" for name, value in spec.generation_ignored.items())
        odd.append(f"generation_config.json asks for what is not supported, ignored: {ignored}")
    return odd + check_files(folder, spec) if check_weights else odd


def check_working_directory() -> None:
    """Libraries ask for it when they are imported, and relative paths begin there.

    Raises:
        ConfigError: it was deleted.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(
            f"the working directory is gone ({error.strerror}): change to one that exists, then try again"
        ) from None


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder has any of the files that a tokenizer is read from."""
    return any(os.path.lexists(folder / name) for name in _TOKENIZER_FILES)


def check_tokenizer_files(folder: Path) -> None:
    """What can be told of a tokenizer's files in an instant, without the library that reads them.

    Raises:
        ModelError: one may not be read, is no file, or, if it is one of the short ones, holds no JSON object.
    """
    from tpworker.json_file import open_file, read_object

    for name in _TOKENIZER_FILES:
        with suppress(FileNotFoundError):
            open_file(folder / name).close()
    for name in _SHORT_FILES:
        with suppress(FileNotFoundError):
            read_object(folder / name)


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The model's tokenizer; None if its folder has none: then prompts must be token ids.

    Raises:
        ModelError: it cannot be read.
    """
    if not has_tokenizer(folder):
        return None
    check_tokenizer_files(folder)
    from tpworker.text.panics import panics_are
    from tpworker.text.tokenizer import Tokenizer

    def unreadable(what: str) -> ModelError:
        return ModelError(f"the tokenizer in {folder} cannot be read: {what}; fetch it again")

    try:
        with panics_are(unreadable):
            return Tokenizer.load(folder)
    except ModelError as error:
        raise ModelError(one_line(str(error), _LONGEST_LINE)) from error


def in_daemon_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """Runs a function in a thread of its own, which does not keep the process alive: a download that was
    cancelled with Ctrl-C must not have to be waited for. For work that is done once."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return  # cancelled
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # None only where T allows it

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as caught:
            error = caught
        if not loop.is_closed():
            loop.call_soon_threadsafe(deliver, result, error)

    threading.Thread(target=run, name="tpworker-start", daemon=True).start()
    return future
