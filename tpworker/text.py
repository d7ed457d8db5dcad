"""Text to token ids and back: a model's tokenizer, and the incremental text of one request.

A token's contribution to the text does not depend on its neighbours, but for characters whose UTF-8
bytes are spread over several tokens. So each token id is mapped to a *piece*, once per tokenizer: to a
`str` where it is whole characters, to `bytes` where it is not; and a request's stream decodes UTF-8
incrementally. That is exact, and costs the same for every token of an output, however long. (tokenizers'
own DecodeStream decodes all tokens since the last whole character again with each new one: a model that
repeats half a character costs it time quadratic in the output, and byte fallback can make it raise.)
"""

from __future__ import annotations

import inspect
import json
import re
from codecs import utf_8_decode
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tpworker.errors import InvalidRequest, ModelError
from tpworker.token_bound import TokenBound

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A model's tokenizer and chat template, as transformers reads them.

    Every method may be called from several threads at once. `encode` releases the interpreter lock while
    it works.
    """

    def __init__(self, fast: Any) -> None:
        """
        Args:
            fast: a transformers tokenizer with a `backend_tokenizer`.
        """
        self._fast = fast
        # The backend is called directly: transformers' wrapper sets truncation and padding on it with
        # every call, so that two threads would get in each other's way.
        self._backend = fast.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        decoder = self._backend.decoder
        self._decoder_kinds = _kinds(json.loads(decoder.__getstate__())) if decoder is not None else set()
        self._bytes_of_char = _bytes_of_char() if "ByteLevel" in self._decoder_kinds else {}
        self._anchor: list[int] = self._backend.encode("a", add_special_tokens=False).ids
        self._anchor_text: str = self._backend.decode(self._anchor)
        # What is not for the template but for transformers: among it a template of the client's own.
        self._template_options = frozenset(inspect.signature(fast.apply_chat_template).parameters)
        self._pieces: dict[int, str | bytes] = {}
        self._bound = TokenBound(self._backend)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read the tokenizer of a model folder.

        Raises:
            ModelError: there is none, it is broken, or it is of a kind that cannot be read.
        """
        from transformers import PreTrainedTokenizerFast

        # The plain class takes tokenizer.json as it stands, and does not import torch. AutoTokenizer does,
        # and picks a class that may rebuild it from its own notion of that model's tokenizer.
        tokenizer_class = PreTrainedTokenizerFast
        if not (folder / "tokenizer.json").is_file():
            from transformers import AutoTokenizer

            tokenizer_class = AutoTokenizer
        try:
            fast = tokenizer_class.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # what transformers raises for a broken file is no contract
            raise ModelError(
                f"the tokenizer in {folder} cannot be read ({type(error).__name__}: {error}). The folder "
                "needs a tokenizer.json that the installed tokenizers library can read."
            ) from error
        if not hasattr(fast, "backend_tokenizer"):
            raise ModelError(
                f"the tokenizer in {folder} is a {type(fast).__name__}, written in Python. "
                "Only those that can be saved as tokenizer.json are supported."
            )
        return cls(fast)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text.

        Args:
            text: names of special tokens in it become those tokens.
            add_special_tokens: whether to add what the model expects around a text, such as a
                beginning-of-sequence token. Not wanted after `apply_chat_template`, which writes them.

        Raises:
            InvalidRequest: the text holds half of a surrogate pair.
        """
        try:
            # Of the encode functions the only one that lets other threads run all the while.
            encoding = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        except TypeError as error:
            raise InvalidRequest(
                f"the text cannot be tokenised: {_why_not_unicode(text)}", "prompt"
            ) from error
        ids: list[int] = encoding.ids
        return ids

    def at_least(self, text: str, enough: float = float("inf")) -> int:
        """A number of tokens that `encode` makes of a text at least; see `TokenBound.at_least`."""
        return self._bound.at_least(text, enough)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=True)
        return text

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, if the tokenizer names one."""
        eos_id: int | None = self._fast.eos_token_id
        return eos_id

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can work."""
        return bool(self._fast.chat_template)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of a conversation, special tokens included, up to where the assistant answers.

        Args:
            messages: each with a `role` and a `content`.
            add_generation_prompt: whether to end with what opens the assistant's turn.
            variables: handed to the template, e.g. `enable_thinking=False`.

        Raises:
            InvalidRequest: the model has no template, or its template refuses the messages.
        """
        if not self.has_chat_template:
            raise InvalidRequest(
                "the model has no chat template (chat_template in tokenizer_config.json, or "
                "chat_template.jinja), so it cannot chat. Write the prompt yourself: /v1/completions."
            )
        reserved = self._template_options.intersection(variables)
        if reserved:
            raise InvalidRequest(
                f"{min(reserved)!r} cannot be given to the chat template", "chat_template_kwargs"
            )
        try:
            text: str = self._fast.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **variables
            )
        except Exception as error:  # a template is a program that came with the model
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", "messages"
            ) from error
        return text

    def piece(self, token_id: int) -> str | bytes:
        """What a token adds to a text that has begun: characters, or bytes that are not whole ones.

        It is empty for special tokens, and for ids that the model has but the tokenizer has not.
        """
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._find_piece(token_id)
        return piece

    def _find_piece(self, token_id: int) -> str | bytes:
        token: str | None = self._backend.id_to_token(token_id)
        if token is None or token_id in self._special_ids:
            return ""
        if "ByteLevel" in self._decoder_kinds:
            try:
                data = bytes([self._bytes_of_char[char] for char in token])
            except KeyError:  # an added token is written as it is
                return token
            return _text_if_whole(data)
        if "ByteFallback" in self._decoder_kinds and (match := _BYTE_TOKEN.fullmatch(token)):
            return _text_if_whole(bytes([int(match[1], 16)]))
        # Behind an ordinary token, because decoders treat the first token of all in their own way.
        text: str = self._backend.decode([*self._anchor, token_id])
        return text.removeprefix(self._anchor_text)


def _kinds(decoder: Mapping[str, Any]) -> set[str]:
    """The types of a decoder and of all the decoders that it is made of."""
    return {decoder["type"]}.union(*(_kinds(part) for part in decoder.get("decoders", ())))


def _bytes_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters are their own bytes, U+0100… are the others in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _text_if_whole(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _why_not_unicode(text: object) -> str:
    if not isinstance(text, str):
        return f"it is {type(text).__name__}, not str"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        return f"{code} at position {error.start} is half of a surrogate pair, not a character"
    return "the tokenizer does not take it"


class TextDelta(NamedTuple):
    """What some more tokens added to a request's text."""

    text: str
    """Safe to show: whole characters, and not the beginning of a stop string."""
    stopped: str | None
    """The stop string that ended the text, which is cut at its beginning."""
    num_tokens: int
    """How many of the tokens belong to the output: all of them, or up to the one that completed `stopped`."""


class TextStream:
    """The text of one request, token by token.

    All deltas together, and then `finish()`, are what the tokens add to the decoded prompt: the leading
    space of a word stays. Bytes that are not UTF-8 become U+FFFD. Where stop strings overlap, the one
    that is complete first ends the text; of several, the longest.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), hidden_ids: Collection[int] = ()
    ) -> None:
        """
        Args:
            tokenizer: of the model; streams share it.
            stop: strings that end the text. They are not part of it.
            hidden_ids: ids that are not part of the text, as the ids that end an output.
        """
        self._tokenizer = tokenizer
        self._hidden_ids = frozenset(hidden_ids)
        self._stops = _StopStrings(stop) if stop else None
        self._tail = b""  # the beginning of a character
        self._ended = False

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Add tokens; after a stop string they are ignored."""
        if self._ended:
            return TextDelta("", None, 0)
        if self._stops is None:
            return TextDelta("".join([self._characters(i) for i in token_ids]), None, len(token_ids))
        shown = []
        for count, token_id in enumerate(token_ids, start=1):
            # One token at a time: how many come at once is chance, and must not change the result.
            text, stopped = self._stops.feed(self._characters(token_id))
            shown.append(text)
            if stopped is not None:
                self._ended = True
                return TextDelta("".join(shown), stopped, count)
        return TextDelta("".join(shown), None, len(token_ids))

    def finish(self) -> str:
        """What was held back: the text ends here, so it begins no stop string and no character."""
        if self._ended:
            return ""
        self._ended = True
        text = utf_8_decode(self._tail, "replace", True)[0]
        if self._stops is None:
            return text
        shown, stopped = self._stops.feed(text)
        return shown if stopped is not None else shown + self._stops.held

    def _characters(self, token_id: int) -> str:
        """The characters that a token completes."""
        if token_id in self._hidden_ids:
            return ""
        piece = self._tokenizer.piece(token_id)
        if isinstance(piece, str):
            if not self._tail:
                return piece
            if not piece:
                return ""
            piece = piece.encode()
        data = self._tail + piece
        text, num_bytes = utf_8_decode(data, "replace", False)
        self._tail = data[num_bytes:]
        return text


class _StopStrings:
    """Finds the first of several strings in a text that comes in parts (Knuth, Morris and Pratt 1977)."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._matched = [0] * len(stops)  # of each: how many of its characters the text ends with
        self.held = ""  # the text's end, as long as the longest of those

    def feed(self, text: str) -> tuple[str, str | None]:
        """Returns the text that can be shown now, and the stop string that was found, if one was."""
        if not self.held and self._first_chars.isdisjoint(text):
            return text, None
        for position, char in enumerate(text, start=len(self.held) + 1):
            found = ""
            for i, (stop, borders) in enumerate(self._stops):
                matched = self._matched[i]
                while matched and stop[matched] != char:
                    matched = borders[matched]
                if stop[matched] == char:
                    matched += 1
                    if matched == len(stop):
                        found = max(found, stop, key=len)
                self._matched[i] = matched
            if found:
                return (self.held + text)[: position - len(found)], found
        whole = self.held + text
        num_shown = len(whole) - max(self._matched)
        self.held = whole[num_shown:]
        return whole[:num_shown], None


def _borders(pattern: str) -> list[int]:
    """Of each prefix of the pattern the longest proper prefix that it also ends with: [length of prefix]."""
    borders = [0, 0]
    border = 0
    for char in pattern[1:]:
        while border and pattern[border] != char:
            border = borders[border]
        if pattern[border] == char:
            border += 1
        borders.append(border)
    return borders
