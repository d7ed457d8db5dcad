"""The safetensors files of a model folder: which tensor is where, without reading any. Imports no torch.

The format: 8 bytes, the header's length; the header, a JSON object from names of tensors to type, shape and
place; the tensors. Whatever the files hold, what is wrong with them is a ModelError in one line.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple

from tpworker.errors import ModelError, shown
from tpworker.json_file import open_file, parse_object, read_object, shown_name, unreadable
from tpworker.model.families import FAMILIES, ModelSpec, why_no_mtp

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_OTHER_FORMATS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_MAX_HEADER = 100_000_000  # the limit of safetensors itself
_MAX_OFFSET = 1 << 63
_MAX_DIMS = 16
_BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
}
_PIECE = 1 << 20


class Entry(NamedTuple):
    """A tensor as a header describes it."""

    dtype: str  # as safetensors names it, e.g. BF16
    shape: tuple[int, ...]
    begin: int  # bytes from the beginning of the file
    end: int


class WeightFiles:
    """The safetensors of a folder: model.safetensors, or else the files that the index names."""

    def __init__(self, folder: Path, file: Path | None = None) -> None:
        """Find the files. Raises ModelError: there are none, or the index is broken.

        Args:
            file: an absolute path, of what is read in place of the folder's; None: nothing is.
        """
        self.folder = folder
        self.notes: list[str] = []
        """What is to be told of them, a line each."""
        self._headers: dict[str, dict[str, Entry]] = {}
        try:
            self.file_of = (
                self._locate() if file is None else dict.fromkeys(self.header(str(file)), str(file))
            )
        except PermissionError:
            raise unreadable(folder) from None

    def _locate(self) -> dict[str, str]:
        """Which file holds which tensor."""
        has_index = os.path.lexists(self.folder / INDEX)
        if (self.folder / SINGLE).is_file():
            if has_index and set(self._from_index(is_read=False).values()) != {SINGLE}:
                self.notes.append(
                    f"{self.folder} has {SINGLE} and {INDEX}, which names other files: {SINGLE} is read, as "
                    "transformers does; remove what is not meant"
                )
            return dict.fromkeys(self.header(SINGLE), SINGLE)
        if has_index:
            return self._from_index()
        if os.path.lexists(self.folder / SINGLE):
            open_file(self.folder / SINGLE).close()  # says what is wrong with it
        try:
            others = sorted(path.name for path in self.folder.iterdir() if path.suffix in _OTHER_FORMATS)
        except OSError:
            others = []
        more = ", …" if len(others) > 5 else ""
        found = f"; found {', '.join(map(shown_name, others[:5]))}{more}, which is not read" if others else ""
        raise ModelError(
            f"{self.folder} has neither {SINGLE} nor {INDEX}{found}. Fetch or convert the weights, or ask "
            "for random ones with --load-format dummy"
        )

    def _from_index(self, *, is_read: bool = True) -> dict[str, str]:
        """What the index says; nothing if it is broken, and not to be `is_read`."""
        path = self.folder / INDEX
        try:
            weight_map = read_object(path, _MAX_HEADER).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ModelError(f"{path} has no weight_map")
            for file in weight_map.values():
                if (
                    not isinstance(file, str)
                    or os.path.isabs(file)
                    or ".." in PurePath(file).parts
                    or not file
                ):
                    raise ModelError(f"{path}: {shown_name(file)} names no file of the folder")
        except (ModelError, FileNotFoundError) as error:
            if not is_read:
                return {}
            raise ModelError(f"{path} is not a safetensors index: {error}; fetch it again") from None
        return weight_map

    @property
    def names(self) -> Collection[str]:
        """Of all tensors."""
        return self.file_of.keys()

    def header(self, file_name: str) -> dict[str, Entry]:
        """The tensors of one file. Raises ModelError: it is missing, cut off, or no safetensors."""
        if file_name not in self._headers:
            path = self.folder / file_name
            try:
                with open_file(path) as file:
                    self._headers[file_name] = _read_header(path, file)
            except FileNotFoundError:
                raise ModelError(f"{path} is missing, although {INDEX} names it; fetch it again") from None
            except OSError as error:
                raise ModelError(f"{path} cannot be read: {error.strerror}") from error
        return self._headers[file_name]

    def entry(self, name: str) -> Entry | None:
        """Of a tensor; None: there is none of that name, whatever the index says. Raises ModelError."""
        file_name = self.file_of.get(name)
        return None if file_name is None else self.header(file_name).get(name)

    def is_zero(self, name: str) -> bool:
        """Whether a tensor is there and all of its bytes are 0. Reads as far as the first that is not."""
        entry = self.entry(name)
        if entry is None or entry.begin == entry.end:
            return False
        with open_file(self.folder / self.file_of[name]) as file:
            return all(piece.count(0) == len(piece) for piece in _pieces(file, entry))

    def are_equal(self, one: str, other: str) -> bool:
        """Whether two tensors that are there are alike in type, shape and bytes."""
        first, second = self.entry(one), self.entry(other)
        if first is None or second is None or first[:2] != second[:2]:
            return False
        with (
            open_file(self.folder / self.file_of[one]) as file,
            open_file(self.folder / self.file_of[other]) as other_file,
        ):
            return all(a == b for a, b in zip(_pieces(file, first), _pieces(other_file, second), strict=True))


def absent_files(folder: Path) -> list[str]:
    """What the index, if there is one, names and the folder lacks: it may be on its way from the hub."""
    if (folder / SINGLE).exists():
        return []
    if not os.path.lexists(folder / INDEX):
        return [SINGLE]
    try:
        files = set(WeightFiles(folder).file_of.values())
    except ModelError:  # a broken index is for who reads it
        return []
    return sorted(file for file in files if not (folder / file).exists())


@dataclass(frozen=True, slots=True)
class OutputHead:
    """What becomes of the output head of a model whose config.json ties it to the embedding."""

    spec: ModelSpec
    """The model; with an output head of its own, if the files have a different one."""
    aliases: Mapping[str, str]
    """Under which name of the files a tensor is found, if not under its own."""
    note: str | None = None


def output_head(files: WeightFiles, spec: ModelSpec) -> OutputHead:
    """As transformers does it: two tensors that differ stay two, and of one the other is made."""
    names = FAMILIES[spec.family].names
    embed, head = f"{names.embed}.weight", f"{names.lm_head}.weight"
    if not spec.tie_embeddings or head not in files.names:
        return OutputHead(spec, {})
    if embed not in files.names:
        return OutputHead(spec, {embed: head})
    if files.are_equal(embed, head):
        return OutputHead(spec, {})
    note = (
        f"{files.folder}: config.json says tie_word_embeddings, but the checkpoint has {embed} and a "
        f"different {head}: both are used, as transformers does. Set tie_word_embeddings to false"
    )
    return OutputHead(replace(spec, tie_embeddings=False), {}, note)


def check_mtp(files: WeightFiles, spec: ModelSpec) -> None:
    """Look for the head for multi-token prediction. Raises ModelError: there is none, or not all of it."""
    reason = why_no_mtp(spec)
    if reason is not None:
        raise ModelError(reason)
    assert spec.mtp is not None
    names = FAMILIES[spec.family].names.of_mtp(spec.num_layers)
    assert names.mtp is not None
    needed = [names.mtp.projection, names.mtp.embedding_norm, names.mtp.hidden_norm, names.mtp.norm]
    needed += [names.attention_norm, names.query, names.key, names.value, names.output, names.mlp_norm]
    if not spec.mtp.has_experts:
        needed += [names.gate, names.up, names.down]
    elif names.moe is not None:
        needed.append(names.moe.router)
    missing = [name for name in map("{}.weight".format, filter(None, needed)) if name not in files.names]
    if missing:
        raise ModelError(
            f"{files.folder}: config.json names a layer for multi-token prediction, and the checkpoint lacks "
            f"{len(missing)} of its tensors, the first is {missing[0]}: use --speculative-method ngram, "
            "which needs none, leave the option out, or fetch the files with that layer"
        )


def check_files(folder: Path, spec: ModelSpec, *, with_mtp: bool = False) -> list[str]:
    """Read all headers, and look for weights that were never written.

    Args:
        with_mtp: look for the head for multi-token prediction, too.

    Returns:
        What is to be told of the files, a line each.

    Raises:
        ModelError: a file is missing, cut off or no safetensors; or the embedding, the final norm or the
            output head is all zeros, which makes all tokens alike; or the head is missing.
    """
    files = WeightFiles(folder)
    if with_mtp:
        check_mtp(files, spec)
    for file_name in sorted(set(files.file_of.values())):
        files.header(file_name)
    names = FAMILIES[spec.family].names
    for name in (names.embed, names.final_norm, names.lm_head):
        if files.is_zero(f"{name}.weight"):
            raise ModelError(
                f"{folder / files.file_of[f'{name}.weight']}: every value of {name}.weight is 0, so that no "
                "token would be likelier than another: the file was never written in full. Fetch it again, "
                "or ask for random weights with --load-format dummy"
            )
    note = output_head(files, spec).note
    return files.notes if note is None else [*files.notes, note]


def _pieces(file: BinaryIO, entry: Entry) -> Iterator[bytes]:
    """The bytes of a tensor, in turn; fewer if the file has become shorter."""
    file.seek(entry.begin)
    for begin in range(entry.begin, entry.end, _PIECE):
        yield file.read(min(_PIECE, entry.end - begin))


def _read_header(path: Path, file: BinaryIO) -> dict[str, Entry]:
    """What a file's header describes. Raises ModelError."""
    size = os.fstat(file.fileno()).st_size
    broken = f"{path} ({size} bytes) is not a safetensors file"
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(size - 8, _MAX_HEADER):
        raise ModelError(
            f"{broken}, or is cut off in its header, of {length} bytes as the first 8 say (the limit is "
            f"{_MAX_HEADER}): fetch the file again"
        )
    values = parse_object(file.read(length), f"{broken}: its header")
    start = 8 + length
    entries = {
        name: _entry(value, start, f"{broken}: its header: tensor {shown_name(name)}")
        for name, value in values.items()
        if name != "__metadata__"
    }
    beyond = sorted((entry.end, name) for name, entry in entries.items() if entry.end > size)
    if beyond:
        raise ModelError(
            f"{path} is truncated: expected {beyond[-1][0]} bytes, found {size}; {len(beyond)} tensors "
            f"are not there in full, the first is {shown_name(beyond[0][1])}. Fetch the file again"
        )
    return entries


def _entry(value: Any, start: int, where: str) -> Entry:
    """A tensor's description. Raises ModelError."""

    def sizes(key: str) -> tuple[int, ...]:
        sizes = value.get(key)
        if (
            not isinstance(sizes, list)
            or len(sizes) > _MAX_DIMS
            or not all(type(v) is int and 0 <= v < _MAX_OFFSET for v in sizes)
        ):
            raise ModelError(f"{where} has no {key} of a few integers from 0 on: fetch the file again")
        return tuple(sizes)

    if not isinstance(value, dict) or not isinstance(value.get("dtype"), str):
        raise ModelError(f"{where} has no dtype: fetch the file again")
    shape, place = sizes("shape"), sizes("data_offsets")
    if len(place) != 2 or place[0] > place[1]:
        raise ModelError(f"{where} has data_offsets={shown(place)}, not its two ends: fetch the file again")
    bits = _BITS.get(value["dtype"])
    if bits is not None and math.prod(shape) * bits != 8 * (place[1] - place[0]):
        raise ModelError(
            f"{where} has shape {list(shape)} of {value['dtype']}, which does not fill its "
            f"{place[1] - place[0]} bytes: fetch the file again"
        )
    return Entry(value["dtype"], shape, start + place[0], start + place[1])
