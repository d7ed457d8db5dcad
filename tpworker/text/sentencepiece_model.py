"""A tokenizer.model of SentencePiece (arXiv 1808.06226) as a tokenizer of the tokenizers library.

What Llama, Mistral, Gemma and Phi-3 are published with: byte-pair encoding, text as it is, spaces written as
▁. The file is read here, as far as it matters, so that neither sentencepiece nor protobuf is needed; other
kinds are refused. The result is what the published tokenizer.json of these models has: pieces and merges in
the order of their scores, control pieces as special tokens, and a ▁ before each text between special tokens.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tpworker.errors import ModelError, shown
from tpworker.json_file import open_file, read_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAME = "tokenizer.model"
MAX_BYTES = 64 << 20
MAX_PIECES = 1 << 20
MAX_PIECE = 256  # characters; those of published models have up to 93 bytes

_REMEDY = "fetch the model's tokenizer.json, or save one from transformers"
_SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_BPE = 2
# Classes that add a beginning-of-sequence token unless tokenizer_config.json says otherwise, and no more.
_CLASSES = ("LlamaTokenizer", "GemmaTokenizer", "CodeLlamaTokenizer")


class Piece(NamedTuple):
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What a tokenizer.model says."""

    pieces: tuple[Piece, ...]
    has_bytes: bool
    """What has no piece becomes its UTF-8 bytes, which have one each."""
    adds_space: bool
    """A text begins with a space."""
    unknown_id: int
    bos_id: int
    """-1: there is none."""
    eos_id: int

    def token(self, token_id: int) -> str | None:
        """The text of a piece; None if there is none."""
        return self.pieces[token_id].text if 0 <= token_id < len(self.pieces) else None


def is_sentencepiece(path: Path) -> bool:
    """Whether a tokenizer.model is SentencePiece's, and not base64 as Llama 3's. Raises ModelError."""
    with open_file(path) as file:
        return file.read(1) == b"\n"


def read_model(path: Path) -> SentencePieceModel:
    """Read a tokenizer.model.

    Raises:
        FileNotFoundError: there is none.
        ModelError: it is none, is cut off, or is of a kind that is not served; in one line.
    """
    with open_file(path) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ModelError(f"{path} has more than {MAX_BYTES} bytes, the limit: it is not what its name says")
    try:
        return _parse(data, path)
    except ModelError:
        raise
    except (ValueError, IndexError, struct.error, TypeError) as error:
        raise ModelError(
            f"{path} ({len(data)} bytes) is not a SentencePiece model, or is cut off ({error}): fetch it "
            "again"
        ) from None


def build(model: SentencePieceModel) -> Tokenizer:
    """The same as a tokenizer of the tokenizers library, without what is added around a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    ids = {piece.text: number for number, piece in enumerate(model.pieces)}
    unknown = model.token(model.unknown_id)
    bpe = models.BPE(
        vocab=ids,
        merges=_merges(model.pieces),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=model.has_bytes,
    )
    tokenizer = Tokenizer(bpe)
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    if model.adds_space:
        spaces.insert(0, normalizers.Prepend(_SPACE))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    stages: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.adds_space:
        stages.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(stages)
    # Symbols with a ▁ in them are looked for where spaces are written so already.
    tokenizer.add_tokens(
        [
            AddedToken(piece.text, normalized=_SPACE in piece.text, special=piece.kind != _USER_DEFINED)
            for piece in model.pieces
            if piece.kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    return tokenizer


def around_text(folder: Path, model: SentencePieceModel) -> tuple[str | None, str | None]:
    """The tokens that are added before and behind a text.

    Raises:
        ModelError: tokenizer_config.json names a class of which that is not known, or is broken.
    """
    try:
        config = read_object(folder / "tokenizer_config.json")
    except FileNotFoundError:
        config = {}
    name = config.get("tokenizer_class")
    if name is not None and str(name).removesuffix("Fast") not in _CLASSES:
        raise ModelError(
            f"{folder / 'tokenizer_config.json'}: tokenizer_class={shown(name)}: with {NAME} alone, only "
            f"{', '.join(_CLASSES)} can be read: {_REMEDY}"
        )
    added = (
        ("add_bos_token", True, "bos_token", model.bos_id),
        ("add_eos_token", False, "eos_token", model.eos_id),
    )
    before, behind = (
        _name(config.get(key)) or model.token(token_id) if config.get(switch, default) else None
        for switch, default, key, token_id in added
    )
    return before, behind


def _name(value: object) -> str | None:
    """A token of tokenizer_config.json: its text, or an object with its text."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _merges(pieces: tuple[Piece, ...]) -> list[tuple[str, str]]:
    """Which two pieces become one, in the order of the scores of what they become."""
    parts = {piece.text for piece in pieces if piece.kind in (_NORMAL, _USER_DEFINED)}
    ordered = sorted((piece for piece in pieces if piece.text in parts), key=lambda piece: -piece.score)
    return [
        (text[:cut], text[cut:])
        for text, _, _ in ordered
        for cut in range(1, len(text))
        if text[:cut] in parts and text[cut:] in parts
    ]


# ------------------------------------------------------------------------- the file, a protocol buffer


def _parse(data: bytes, path: Path) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for field, value in _fields(data):
        if field == 1:
            entry = dict(_fields(_bytes(value)))
            pieces.append(
                Piece(
                    _bytes(entry.get(1, b"")).decode(),
                    struct.unpack("<f", _bytes(entry.get(2, bytes(4))))[0],
                    _integer(entry.get(3, _NORMAL)),
                )
            )
        elif field == 2:
            trainer = dict(_fields(_bytes(value)))
        elif field == 3:
            normalizer = dict(_fields(_bytes(value)))
    if not pieces or len({piece.text for piece in pieces}) < len(pieces) or len(pieces) > MAX_PIECES:
        raise ValueError(f"{len(pieces)} pieces, or two are alike")
    if any(len(piece.text) > MAX_PIECE or piece.score != piece.score for piece in pieces):
        raise ValueError(f"a piece has more than {MAX_PIECE} characters, or no score")
    kinds = {
        "model_type": _integer(trainer.get(3, 1)) == _BPE,
        "precompiled_charsmap": not _bytes(normalizer.get(2, b"")),
        "remove_extra_whitespaces": not _integer(normalizer.get(4, 1)),
        "escape_whitespaces": bool(_integer(normalizer.get(5, 1))),
        "treat_whitespace_as_suffix": not _integer(trainer.get(24, 0)),
    }
    adds_space = bool(_integer(normalizer.get(3, 1)))
    if adds_space:  # which tokenizers would do anew behind each of them
        kinds["user-defined symbols behind an added space"] = all(p.kind != _USER_DEFINED for p in pieces)
    if odd := [name for name, is_known in kinds.items() if not is_known]:
        raise ModelError(
            f"{path}: only byte-pair encodings of text as it is can be read, and its {' and '.join(odd)} say "
            f"otherwise: {_REMEDY}"
        )
    return SentencePieceModel(
        pieces=tuple(pieces),
        has_bytes=sum(piece.kind == _BYTE for piece in pieces) == 256,
        adds_space=adds_space,
        unknown_id=_integer(trainer.get(40, 0)),
        bos_id=_integer(trainer.get(41, 1)),
        eos_id=_integer(trainer.get(42, 2)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of a message's fields; of fixed width, as bytes. Raises ValueError, IndexError."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            number, place = _varint(data, place)
            yield key >> 3, number - (1 << 64) if number >> 63 else number
            continue
        if kind == 2:
            length, place = _varint(data, place)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if place + length > len(data):
            raise ValueError("a field ends behind the end")
        yield key >> 3, data[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """An integer of seven bits a byte, and where it ends."""
    number = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, place
    raise ValueError("an integer of more than ten bytes")


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError("an integer where bytes are expected")
    return value


def _integer(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise TypeError("bytes where an integer is expected")
    return value
