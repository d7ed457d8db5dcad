"""From what the user wrote after --model to a folder on this machine."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from tpworker.checkpoint.default_model import Progress, ensure_default_model
from tpworker.errors import ModelError, shown
from tpworker.json_file import open_file, unreadable

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CONFIG_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
_WEIGHT_FILES = ["*.safetensors"]
# Many repositories hold the same weights again: in subfolders for other runtimes, or as one file.
_IGNORED_FILES = ["*/*", "consolidated*"]


def resolve_model(model: str | None, progress: Progress, *, weights: bool = True) -> Path:
    """Return the folder of a model, fetching it first where that is needed.

    Args:
        model: a folder, a name on the hub (`org/name`), or None for the default model.
        progress: told what is going on, as `ensure_default_model` tells it.
        weights: whether the hub's weights are wanted; dummy weights need only the configuration.

    Raises:
        ModelError: there is no such model, it cannot be fetched, or its folder lacks config.json.
    """
    if model is None:
        return ensure_default_model(progress)
    folder = local_folder(model)
    return _checked(_from_hub(model, progress, weights) if folder is None else folder)


def local_folder(model: str) -> Path | None:
    """The folder on this machine that `model` names; None: it is a name on the hub.

    Raises:
        ModelError: it is neither, or cannot be looked at.
    """
    try:
        path = Path(model).expanduser()
        kind = _kind(path)
    except RuntimeError:
        raise ModelError(
            f"--model {shown(model)}: nobody knows of this home folder (no such user, or HOME is not set). "
            "Give the whole path of the model's folder."
        ) from None
    except PermissionError:
        raise unreadable(path) from None
    except (OSError, ValueError) as error:  # a name that can be none
        raise _neither(model, error) from None
    if kind == "folder":
        return path
    if kind is not None:
        raise ModelError(
            f"--model {model} is a file, and a model is a folder with config.json, *.safetensors and "
            f"tokenizer.json. If the folder is {path.parent}, name that; other formats must be converted."
        )
    if _HUB_NAME.fullmatch(model):
        return None
    raise _neither(model)


def _neither(model: str, error: Exception | None = None) -> ModelError:
    why = "" if error is None else f" ({getattr(error, 'strerror', None) or error})"
    return ModelError(
        f"--model {shown(model)} is neither a folder on this machine nor a hub name (org/name){why}. Check "
        "the spelling, or leave --model out to serve the default model."
    )


def _kind(path: Path) -> str | None:
    """'folder', 'file', 'other' (a pipe, a device), None: nothing.

    Raises:
        OSError, ValueError: it cannot be looked at. pathlib tells of some of these, and not in every Python.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def _checked(folder: Path) -> Path:
    """The folder, if it has config.json. Weights and tokenizer are for their loaders to miss or not."""
    try:
        open_file(folder / "config.json").close()
        return folder
    except FileNotFoundError:
        pass
    wanted = ["config.json", "*.safetensors", "tokenizer.json"]
    if any(folder.glob("tokenizer.model")):
        wanted.remove("tokenizer.json")
    missing = [pattern for pattern in wanted if not any(folder.glob(pattern))]
    raise ModelError(
        f"{folder} is not a model folder: {', '.join(missing)} missing. "
        "Name the folder that holds config.json, the weights and the tokenizer."
    )


def cached_folder(name: str) -> Path | None:
    """What the hub's cache on this machine holds of a model, perhaps not all; None: nothing.

    Raises:
        ModelError: there can be no such name, or the cache cannot be read.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError:
        raise _neither(name) from None
    except Exception as error:
        raise _useless_cache(name, str(error)) from error


def _from_hub(name: str, progress: Progress, weights: bool) -> Path:
    """What the hub's cache holds of the model, after fetching what it lacks. The hub shows its own bars."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    progress(f"fetching {name} from the hub", None)
    try:
        folder = snapshot_download(
            name,
            allow_patterns=_CONFIG_FILES + _WEIGHT_FILES * weights,
            ignore_patterns=_IGNORED_FILES,
        )
    except HFValidationError:
        raise _neither(name) from None
    except GatedRepoError as error:
        raise ModelError(
            f"--model {name}: access to it on the hub must be granted first. Ask for it on the model's "
            "page, then set HF_TOKEN or run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"--model {name}: not a folder, and the hub has no model of that name that you may see. Check "
            "the spelling, or set HF_TOKEN if it is private."
        ) from error
    except Exception as error:  # whatever its HTTP library raises, which is not the same in every release
        if trouble := next(filter(_is_of_the_cache, _chain(error)), None):
            raise _useless_cache(name, str(trouble)) from error
        cause = str(error.__cause__ or error).rstrip(". ")
        raise ModelError(
            f"--model {name}: not a folder, and the hub could not be reached: {cause}. Download the model "
            "elsewhere and give its folder, or leave --model out to serve the default model."
        ) from error
    return Path(folder)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_of_the_cache(error: BaseException) -> bool:
    """Whether it is files that failed, or finding a place for them, and not the network."""
    if isinstance(error, OSError):
        return error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    return type(error) is RuntimeError and "home directory" in str(error)  # as pathlib says it


def _useless_cache(name: str, why: str) -> ModelError:
    return ModelError(
        f"--model {name}: not a folder, and the hub's cache cannot be used: {why.rstrip('. ')}. Set HF_HOME "
        f"to a folder that this user (uid {os.getuid()}) may write to and that has room for the model."
    )
