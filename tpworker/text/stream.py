"""The incremental text of one request: from token ids to text as they come, and to stop strings.

How, and at what cost, is said in tokenizer.py.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from tpworker.text.decoding import Filter, Rule, StripLeft, Window
from tpworker.text.stops import StopStrings
from tpworker.text.tokenizer import Tokenizer
from tpworker.text.vocabulary import Vocabulary


class Detokenizer:
    """The text of one output, token by token: what its tokens add to the decoded prompt.

    All texts together, and then `finish()`, are what `Tokenizer.decode` makes of prompt and output, special
    tokens shown or not as the vocabulary has it, behind what it makes of the prompt, as far as decoding more
    tokens only ever adds to the text. What it takes back is not shown: spaces at the end, or that clean-up
    removes, wait for what comes behind them. Bytes that are not UTF-8 become U+FFFD as `bytes.decode` has it;
    byte fallback has one for each byte of a run with a fault in it, which is not known while the run lasts.
    Characters begin and end in the output.
    """

    __slots__ = (
        "_filters", "_hidden_ids", "_is_first", "_pieces", "_previous", "_tail", "_vocabulary", "_window",
    )  # fmt: skip

    def __init__(
        self, vocabulary: Vocabulary, hidden_ids: Collection[int] = (), prompt: Sequence[int] = ()
    ) -> None:
        decoding = vocabulary.decoding
        self._vocabulary = vocabulary
        self._hidden_ids = frozenset(hidden_ids)
        self._tail = b""  # the beginning of a character
        before = _last_tokens(vocabulary, prompt, Window.NUM_KEPT if decoding.rule is Rule.WINDOW else 1)
        self._previous = before[-1] if before else None
        self._is_first = not before
        self._filters = self._filters_behind(prompt)
        self._window = Window(decoding.decode, before) if decoding.rule is Rule.WINDOW else None
        self._pieces: Mapping[int, str | bytes] = {}  # until they are all that counts
        self._settle()

    def push(self, token_id: int) -> str:
        """The characters that a token completes."""
        if token_id in self._hidden_ids:
            return ""
        piece = self._pieces.get(token_id)
        if piece is None:
            return self._next(token_id)
        if not self._tail and isinstance(piece, str):
            return piece
        return self._characters(piece)

    def finish(self) -> str:
        """What was held back: the text ends here."""
        tail, self._tail = self._tail, b""
        text = utf_8_decode(tail, "replace", True)[0]
        if self._window is not None:
            text = self._window.finish()
        for stage in self._filters:
            text = stage.feed(text) + stage.finish()
        return text

    def _filters_behind(self, prompt: Sequence[int]) -> list[Filter]:
        """The filters as the prompt leaves them: what its beginning does to it may not be done yet."""
        decoding = self._vocabulary.decoding
        if self._is_first or not decoding.strips_left:
            return decoding.filters(is_first=self._is_first)
        beginning = Detokenizer(self._vocabulary)
        for token_id in prompt:
            beginning.push(token_id)
            if not any(isinstance(stage, StripLeft) for stage in beginning._filters):
                return decoding.filters(is_first=False)
        beginning.finish()  # what waits there is the prompt's
        return beginning._filters

    def _settle(self) -> None:
        """From here on it may be that only the pieces count."""
        self._filters = [stage for stage in self._filters if not stage.is_done]
        decoding = self._vocabulary.decoding
        is_beginning = self._is_first and decoding.first_is_special
        if decoding.rule is Rule.TOKEN and not self._filters and not is_beginning:
            self._pieces = self._vocabulary.pieces

    def _next(self, token_id: int) -> str:
        """Of a token that is not in `_pieces`, or while more than they counts."""
        if self._pieces is self._vocabulary.pieces:
            return self._characters(self._vocabulary.piece(token_id))
        token = self._vocabulary.token(token_id)
        if token is None:
            return ""
        decoding = self._vocabulary.decoding
        if self._window is not None:
            text = self._window.push(token)
        elif decoding.rule is Rule.PAIR:
            text = decoding.pair(self._previous, token)
            self._previous = token
        else:
            text = self._characters(
                decoding.piece(token, is_first=True) if self._is_first else self._vocabulary.piece(token_id)
            )
        for stage in self._filters:
            text = stage.feed(text)
        self._is_first = False
        self._settle()
        return text

    def _characters(self, piece: str | bytes) -> str:
        if not piece:
            return ""
        data = self._tail + (piece.encode() if isinstance(piece, str) else piece)
        text, num_bytes = utf_8_decode(data, "replace", False)
        self._tail = data[num_bytes:]
        return text


def _last_tokens(vocabulary: Vocabulary, prompt: Sequence[int], count: int) -> list[str]:
    """The last tokens of a prompt that are text, at most so many."""
    found: list[str] = []
    for token_id in reversed(prompt):
        token = vocabulary.token(token_id)
        if token is not None:
            found.append(token)
            if len(found) == count:
                break
    return found[::-1]


class TextDelta(NamedTuple):
    """What some more tokens added to a request's text."""

    text: str
    """Safe to show: whole characters, and not the beginning of a stop string."""
    stopped: str | None
    """The stop string that ended the text, which is cut at its beginning."""
    num_tokens: int
    """How many of the tokens belong to the output: all of them, or up to the one that completed `stopped`."""


class TextStream:
    """The text of one request, token by token: what `Detokenizer` makes of it, up to a stop string.

    Where stop strings overlap, the one that is complete first ends the text; of several, the longest. The
    name of a special token in a stop string stands for that token, which is no text, and for its characters.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        hidden_ids: Collection[int] = (),
        *,
        min_tokens: int = 0,
        prompt: Sequence[int] = (),
        skip_special_tokens: bool = True,
        shown_special_tokens: Collection[str] = (),
        include_stop: bool = False,
    ) -> None:
        """
        Args:
            tokenizer: of the model; streams share it.
            stop: strings that end the text. They are not part of it, unless that is asked for.
            hidden_ids: ids that are not part of the text, as the ids that end an output.
            min_tokens: a stop string that is complete within so many tokens is text.
            prompt: what comes before; the end of it counts.
            skip_special_tokens: whether special tokens are no text. Else their names are characters, as any.
            shown_special_tokens: names of some that are text all the same.
            include_stop: whether the stop string that ends the text is the end of it; of a special token in
                one the name only if those are text.
        """
        special = dict(tokenizer.special) if skip_special_tokens else {}
        shown = [special.pop(name, None) for name in shown_special_tokens]
        if shown:
            hidden_ids = {*hidden_ids, *special.values()}
        vocabulary = tokenizer if skip_special_tokens and not shown else tokenizer.with_special
        self._detokenizer = Detokenizer(vocabulary, hidden_ids, prompt)
        self._characters = self._detokenizer.push
        self._stops = StopStrings(stop, special, include_stop) if stop else None
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._ended = False

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Add tokens; after a stop string they are ignored."""
        if self._ended:
            return TextDelta("", None, 0)
        characters, stops = self._characters, self._stops
        if stops is None:
            if len(token_ids) == 1:
                return TextDelta(characters(token_ids[0]), None, 1)
            return TextDelta("".join([characters(i) for i in token_ids]), None, len(token_ids))
        shown = []
        for count, token_id in enumerate(token_ids, start=1):
            # One token at a time: how many come at once is chance, and must not change the result.
            self._num_tokens += 1
            may_stop = self._num_tokens > self._min_tokens
            if token_id in stops.ids:
                text, stopped = stops.feed_special(token_id, self._detokenizer.finish, may_stop)
            else:
                text, stopped = stops.feed(characters(token_id), may_stop)
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
        text = self._detokenizer.finish()
        if self._stops is None:
            return text
        shown, stopped = self._stops.feed(text, self._num_tokens > self._min_tokens)
        return shown if stopped is not None else shown + self._stops.held
