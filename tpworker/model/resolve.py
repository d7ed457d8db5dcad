"""From what the user wrote after --model to a folder on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from tpworker.errors import ModelError
from tpworker.model.default_model import Progress, ensure_default_model

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
        ModelError: it is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(
            f"--model {model} is a file, and a model is a folder with config.json, *.safetensors and "
            f"tokenizer.json. If the folder is {path.parent}, name that; other formats must be converted."
        )
    if _HUB_NAME.fullmatch(model):
        return None
    raise _neither(model)


def _neither(model: str) -> ModelError:
    return ModelError(
        f"--model {model!r} is neither a folder on this machine nor a hub name (org/name). Check the "
        "spelling, or leave --model out to serve the default model."
    )


def _checked(folder: Path) -> Path:
    """The folder, if it has config.json. Weights and tokenizer are for their loaders to miss or not."""
    if (folder / "config.json").is_file():
        return folder
    wanted = ["config.json", "*.safetensors", "tokenizer.json"]
    missing = [pattern for pattern in wanted if not any(folder.glob(pattern))]
    raise ModelError(
        f"{folder} is not a model folder: {', '.join(missing)} missing. "
        "Name the folder that holds config.json, the weights and the tokenizer."
    )


def cached_folder(name: str) -> Path | None:
    """What the hub's cache on this machine holds of a model, perhaps not all; None: nothing.

    Raises:
        ModelError: there can be no such name.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError:
        raise _neither(name) from None


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
        cause = str(error.__cause__ or error).rstrip(". ")
        raise ModelError(
            f"--model {name}: not a folder, and the hub could not be reached: {cause}. Download the model "
            "elsewhere and give its folder, or leave --model out to serve the default model."
        ) from error
    return Path(folder)
