"""JSON files of a model folder, which may hold anything: read within bounds, or refused in one line.

Imports no torch.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from tpworker.errors import ModelError, shown

MAX_BYTES = 16 << 20
"""Of a file that a person may have written. Those of published models have less than 1 MiB."""


def shown_name(name: object) -> str:
    """A name from a file as it is, unless it is long or not to be printed."""
    return name if isinstance(name, str) and len(name) <= 200 and name.isprintable() else shown(name)


def open_file(path: Path) -> BinaryIO:
    """Open a file of a model folder; whatever else has its name does not make us wait.

    Raises:
        FileNotFoundError: nothing has this name.
        ModelError: it may not be read, is no file, or is a link to nothing.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if path.is_symlink():
            raise ModelError(
                f"{path} is a link to {os.readlink(path)}, which is missing: fetch the file again"
            ) from None
        raise
    except PermissionError:
        raise unreadable(path) from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        what = "a folder" if stat.S_ISDIR(kind) else "a device or a pipe"
        raise ModelError(f"{path} is {what}, not a file: remove it, or fetch the model again")
    return os.fdopen(descriptor, "rb")


def unreadable(path: Path) -> ModelError:
    """What is said of a file or folder that this user may not read."""
    return ModelError(
        f"{path} may not be read by this user (uid {os.geteuid()}): permit it (chmod, chown; every folder "
        "above it needs x), or copy the model to where it may be read"
    )


def read_object(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        FileNotFoundError: nothing has this name.
        ModelError: it cannot be read, has more than `max_bytes`, or holds no JSON object that can be read.
    """
    with open_file(path) as file:
        try:
            data = file.read(max_bytes + 1)
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > max_bytes:
        raise ModelError(f"{path} has more than {max_bytes} bytes, the limit: it is not what its name says")
    return parse_object(data, str(path))


def parse_object(data: bytes, name: str) -> dict[str, Any]:
    """The JSON object that is written in `data`. Raises ModelError, which begins with `name`."""
    try:
        values = json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise ModelError(
            f"{name} cannot be read as UTF-8: {error.reason} at byte {error.start}; fetch it again"
        ) from None
    except json.JSONDecodeError as error:
        raise ModelError(f"{name} is not valid JSON: {error}; fetch it again") from None
    except ValueError:  # of json's number parser
        raise ModelError(
            f"{name} is not valid: it holds an integer of more than 4300 digits, the limit; correct it"
        ) from None
    except RecursionError:
        raise ModelError(
            f"{name} is not valid: it nests lists and objects deeper than can be read (about 1,000 levels); "
            "fetch it again"
        ) from None
    if not isinstance(values, dict):
        raise ModelError(f"{name} holds {type(values).__name__}, not an object")
    return values
