"""Text to token ids and back: a model's tokenizer, and the incremental text of one request.

With most tokenizers a token's contribution to the text does not depend on its neighbours, but for characters
whose UTF-8 bytes are spread over several tokens. So each token id is mapped to a *piece*, once per tokenizer:
to a `str` where it is whole characters, to `bytes` where it is not; and a request's stream decodes UTF-8
incrementally. That is exact, and costs the same for every token of an output, however long. (tokenizers'
own DecodeStream decodes all tokens since the last whole character again with each new one: a model that
repeats half a character costs it time quadratic in the output, and byte fallback can make it raise.)
For which tokenizers that holds, and what is done with the others, at a bounded cost too, is in decoding.py.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpworker.chat.continuing import Continuation
from tpworker.chat.variables import check_variables
from tpworker.errors import InvalidRequest, ModelError, RuntimeStopped, shown
from tpworker.text import sentencepiece_model
from tpworker.text.decoding import Decoding, no_text
from tpworker.text.panics import panics_are
from tpworker.text.token_bound import TokenBound
from tpworker.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tpworker.chat.renderer import TemplateRenderer

_BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that are read beside a tokenizer.json."""

NO_TEMPLATE = (
    "the model has no chat template (chat_template in tokenizer_config.json, or chat_template.jinja), so it "
    "cannot chat. Write the prompt yourself: /v1/completions."
)


class Tokenizer(Vocabulary):
    """A model's tokenizer and chat template, as transformers reads them; a vocabulary without special tokens.

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
        backend = fast.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        special_ids = frozenset(i for i, token in added.items() if token.special)
        decoding = Decoding(backend.decoder, _cleans_up(fast))
        super().__init__(backend, decoding, special_ids)
        self.with_special = Vocabulary(backend, decoding)
        """The same, of which special tokens are part."""
        self.special = {added[i].content: i for i in special_ids}
        """The ids of special tokens, by their names."""
        self.added = {token.content: i for i, token in added.items()}
        """The ids of all tokens that were added to the vocabulary, special or not, by their names."""
        self._bound = TokenBound(self._backend)
        self._renderer: TemplateRenderer | None = None
        self._renderer_lock = threading.Lock()
        self._is_closed = False

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
        model = folder / sentencepiece_model.NAME
        if not (folder / "tokenizer.json").is_file():
            if model.is_file() and sentencepiece_model.is_sentencepiece(model):
                return cls(_from_sentencepiece(folder))
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
            with panics_are(_no_tokens):
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

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids, without special tokens unless they are asked for."""
        with panics_are(no_text):
            text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return self.decoding.clean_up(text)

    def to_json(self) -> str:
        """All of it, as the text of a tokenizer.json: up to 20 MB, made anew with each call.

        Raises:
            ModelError: it has a part that is written in Python.
        """
        try:
            with panics_are(ModelError):
                text: str = self._backend.to_str()
        except Exception as error:  # what the library raises is no contract
            raise ModelError(f"the tokenizer cannot be written as a tokenizer.json: {error}") from None
        return text

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, if the tokenizer names one."""
        eos_id: int | None = self._fast.eos_token_id
        return eos_id

    def use_chat_template(self, template: str) -> None:
        """Takes a template in place of the model's own, before any conversation.

        Raises:
            InvalidRequest: it is broken.
        """
        self._fast.chat_template = template
        self._open_renderer().check()

    @property
    def description(self) -> dict[str, Any]:
        """What clients may want to know of it, in tokenizer_config.json's words."""
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        special = self._fast.special_tokens_map
        return {
            "tokenizer_class": type(self._fast).__name__,
            **{name: special.get(name) for name in names},
            "vocab_size": self._backend.get_vocab_size(with_added_tokens=True),
            "chat_template": self._template() if self.has_chat_template else None,
        }

    @property
    def chat_template(self) -> str | None:
        """The template's source; None: there is none that could be used."""
        try:
            return self._template()
        except InvalidRequest:
            return None

    @property
    def has_chat_template(self) -> bool:
        """Whether there is one for `apply_chat_template`."""
        return bool(self._fast.chat_template)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation, special tokens included, up to where the assistant answers.

        It is rendered by a process of its own, bounded in time, memory and text (chat/renderer.py), which
        the first call starts. `close` ends it.

        Args:
            messages: each with a `role` and a `content`, which is a string or a list of parts as the OpenAI
                API has them. A template that wants the other form gets that.
            tools: what the assistant may call, each as the OpenAI API has it.
            add_generation_prompt: whether to end with what opens the assistant's turn.
            continue_final_message: whether to end where the last message's text does; then nothing is opened.
            variables: handed to the template, e.g. `enable_thinking=False`.

        Raises:
            InvalidRequest: the model has no template, or its template is broken, refuses the messages,
                fails on them, or goes beyond its bounds; or a variable's name is not for clients.
            RuntimeStopped: it was closed.
        """
        check_variables(variables)
        wrong = [type(message).__name__ for message in messages if not isinstance(message, Mapping)]
        if wrong or not messages:
            what = f"a {wrong[0]} is no mapping with role and content" if wrong else "there is none"
            raise InvalidRequest(f"the chat template refuses these messages: {what}", "messages")
        context: dict[str, Any] = {
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        renderer = self._open_renderer()
        if not continue_final_message:
            return renderer.render(messages, context, variables)
        continuation = Continuation()
        context["add_generation_prompt"] = False
        return continuation.cut(renderer.render(continuation.marked(messages), context, variables))

    def close(self) -> None:
        """Ends what renders chat templates, conversations that are being rendered too. No more come then."""
        with self._renderer_lock:
            self._is_closed = True
            if self._renderer is not None:
                self._renderer.close()

    def _open_renderer(self) -> TemplateRenderer:
        from tpworker.chat.renderer import TemplateRenderer

        with self._renderer_lock:
            if self._is_closed:
                raise RuntimeStopped("the runtime was stopped")
            if self._renderer is None:
                self._renderer = TemplateRenderer(self._template(), self._fast.special_tokens_map)
            return self._renderer

    def _template(self) -> str:
        """The template's source. Of several, which go by names, the one that is called default."""
        template = self._fast.chat_template
        if isinstance(template, Mapping) and template:
            if "default" not in template:
                raise InvalidRequest(
                    f"of the model's chat templates ({', '.join(sorted(template))}) none is named 'default': "
                    "name one so, or use /v1/completions, where you write the prompt yourself",
                    "messages",
                )
            template = template["default"]
        if not template:
            raise InvalidRequest(NO_TEMPLATE)
        if not isinstance(template, str):
            raise InvalidRequest(
                f"the model's chat template is broken: it is {shown(template)}, and must be a string. "
                "Correct tokenizer_config.json, or use /v1/completions, where you write the prompt yourself",
                "messages",
            )
        return template


def _from_sentencepiece(folder: Path) -> Any:
    """A folder's tokenizer.model and the files beside it, read as if they stood beside a tokenizer.json.

    Raises:
        ModelError: see `read_model` and `around_text`.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    model = sentencepiece_model.read_model(folder / sentencepiece_model.NAME)
    before, behind = sentencepiece_model.around_text(folder, model)
    with tempfile.TemporaryDirectory(prefix="tpworker-") as converted:
        sentencepiece_model.build(model).save(f"{converted}/tokenizer.json")
        for name in _BESIDE:
            if (folder / name).exists():
                os.symlink((folder / name).absolute(), f"{converted}/{name}")
        fast = PreTrainedTokenizerFast.from_pretrained(converted, local_files_only=True)
    fast.bos_token = fast.bos_token or model.token(model.bos_id)
    fast.eos_token = fast.eos_token or model.token(model.eos_id)
    added = [token for token in (before, behind) if token is not None]
    if added:
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([*([before] if before else []), "$A", *([behind] if behind else [])]),
            special_tokens=[(token, fast.convert_tokens_to_ids(token)) for token in dict.fromkeys(added)],
        )
    return fast


def _no_tokens(what: str) -> InvalidRequest:
    return InvalidRequest(f"the model's tokenizer fails on this text: {what}. Give token ids", "prompt")


def _cleans_up(fast: Any) -> bool:
    """Whether transformers cleans up spaces in what the tokenizer decodes; not with BPE, as a rule."""
    if not getattr(fast, "clean_up_tokenization_spaces", False):
        return False
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    return type(fast.backend_tokenizer.model).__name__ != "BPE" or bool(getattr(fast, forced, False))


def _why_not_unicode(text: object) -> str:
    if not isinstance(text, str):
        return f"it is {type(text).__name__}, not str"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        return f"{code} at position {error.start} is half of a surrogate pair, not a character"
    return "the tokenizer does not take it"
