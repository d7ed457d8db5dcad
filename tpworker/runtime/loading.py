"""What the runtime process itself needs of a model: its folder, its facts, its tokenizer. No weights."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tpworker.config import RuntimeConfig
from tpworker.errors import ConfigError, InvalidRequest, ModelError, one_line, shown

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
    chat_template: str | None = None  # in place of its own
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of its weights; empty: not known

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
        ConfigError: the working directory is gone, the chat template cannot be read, or the model has no
            head that could draft.
        ModelError: there is no such model, or it cannot be served.
    """
    check_working_directory()
    chat_template = None if config.chat_template is None else _read_template(config.chat_template)
    from tpworker.checkpoint.likeness import shapes_of
    from tpworker.checkpoint.resolve import resolve_model
    from tpworker.model.families import read_spec

    folder = resolve_model(config.model, progress, weights=config.load_format != "dummy").absolute()
    spec = read_spec(folder, config.quantization)
    check_drafts(config, spec)
    with_mtp, are_read = config.speculative_method == "mtp", check_weights and config.load_format != "dummy"
    for line in what_is_odd(folder, spec, are_read, with_mtp):
        logger.warning("%s", line)
    check_tokenizer_files(folder)
    if chat_template is not None and not has_tokenizer(folder):
        raise ConfigError(
            f"chat_template={config.chat_template!r} has no effect: there is no tokenizer in {folder}. Leave "
            "out --chat-template, or fetch tokenizer.json"
        )
    shapes = shapes_of(folder, spec, with_mtp=with_mtp) if are_read else {}
    return FoundModel(folder, spec, config.model or folder.name, chat_template, shapes)


def _read_template(file: str) -> str:
    """The text of a chat template's file.

    Raises:
        ConfigError: it cannot be read as text, or is longer than any.
    """
    from tpworker.json_file import MAX_BYTES, open_file

    try:
        with open_file(Path(file)) as opened:
            data = opened.read(MAX_BYTES + 1)
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"chat_template={file!r}: there is no such file") from None
    except (ModelError, ValueError) as error:  # no file, not to be read, no UTF-8, or no name of a file
        raise ConfigError(f"chat_template={file!r} cannot be read: {error}") from error
    if not text.strip() or len(data) > MAX_BYTES:
        raise ConfigError(f"chat_template={file!r}: it must have some text, and at most {MAX_BYTES} bytes")
    return text


def check_drafts(config: RuntimeConfig, spec: ModelSpec) -> None:
    """Whether a model can draft as it is asked to. Raises ConfigError."""
    from tpworker.model.families import why_no_mtp

    if config.speculative_method == "mtp" and (reason := why_no_mtp(spec)) is not None:
        raise ConfigError(f"speculative_method=mtp: {reason}")


def what_is_odd(folder: Path, spec: ModelSpec, check_weights: bool, with_mtp: bool = False) -> list[str]:
    """What a user should know of a model that can be served, a line each.

    Args:
        check_weights: look into the files of its weights.
        with_mtp: look for those of its head for multi-token prediction, too.

    Raises:
        ModelError: it cannot be served: its weights are missing, cut off, or were never written.
    """
    from tpworker.checkpoint.weight_files import check_files

    odd = list(spec.notes)
    if spec.generation_ignored:
        ignored = ", ".join(f"{name}={shown(value)}" for name, value in spec.generation_ignored.items())
        odd.append(f"generation_config.json asks for what is not supported, ignored: {ignored}")
    return odd + check_files(folder, spec, with_mtp=with_mtp) if check_weights else odd


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


def load_tokenizer_of(model: FoundModel) -> Tokenizer | None:
    """As `load_tokenizer`, with the chat template that the configuration names.

    Raises:
        ConfigError: that template is broken.
    """
    tokenizer = load_tokenizer(model.folder)
    _give_back_memory()
    if tokenizer is not None and model.chat_template is not None:
        try:
            tokenizer.use_chat_template(model.chat_template)
        except InvalidRequest as error:
            tokenizer.close()
            raise ConfigError(f"--chat-template: {error}") from error
    return tokenizer


def _give_back_memory() -> None:
    """What libraries have freed goes back to the system, where the C library is glibc.

    A tokenizer of 50,000 tokens is read by way of 40 MiB. glibc keeps them in the arena of the thread that
    read it, and the next runtime's thread may well have another one.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


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
