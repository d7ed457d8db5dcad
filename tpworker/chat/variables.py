"""Which variables a client may hand to a chat template."""

from __future__ import annotations

import keyword
from collections.abc import Iterable

from tpworker.errors import InvalidRequest

#: What every template is given, or finds around it; Jinja's own names.
_TAKEN = frozenset([
    "messages", "tools", "documents", "add_generation_prompt",
    "raise_exception", "strftime_now", "dict", "namespace", "range", "lipsum", "cycler", "joiner",
    "self", "super", "loop", "caller", "varargs", "kwargs",
])  # fmt: skip
#: Options of transformers' apply_chat_template: who gives them expects them to do something.
_OPTIONS = frozenset([
    "conversation", "chat_template", "continue_final_message", "tokenize", "sanitize_control_tokens",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs",
])  # fmt: skip
_CONSTANTS = frozenset(["true", "false", "none"])

NAMES = {
    "pattern": r"^[^\W\d]\w*$",
    "not": {"enum": sorted({*_TAKEN, *_OPTIONS, *_CONSTANTS, *keyword.kwlist})},
}
"""The names that `check_variables` takes, as a JSON schema."""


def check_variables(names: Iterable[str]) -> None:
    """Whether a template can be given variables of these names.

    Raises:
        InvalidRequest: names the first that it cannot.
    """
    for name in names:
        if name in _TAKEN or name in _OPTIONS:
            why = "the name is taken"
        elif not name.isidentifier() or keyword.iskeyword(name) or name in _CONSTANTS:
            why = "no template can read a variable of that name"
        else:
            continue
        raise InvalidRequest(
            f"chat_template_kwargs: {name!r} cannot be given to the chat template, {why}: leave it out",
            "chat_template_kwargs",
        )
