"""From a body to prompts: rendered, tokenised, and cut. For threads, not for the event loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tpworker.errors import InvalidRequest
from tpworker.sampling_params import SamplingParams
from tpworker.server.dialect import Dialect
from tpworker.server.requests import CompletionRequest, Conversation, GenerationRequest, SpokenRequest
from tpworker.server.speaking import speech_for
from tpworker.server.speech import Speech

if TYPE_CHECKING:
    from tpworker.runtime.runtime import Runtime


def chat_prompt(
    runtime: Runtime,
    body: GenerationRequest,
    conversation: Conversation,
    dialect: Dialect,
    variables: Mapping[str, Any],
) -> tuple[list[int], str]:
    """The token ids of a conversation, and its text.

    Args:
        body: says what else is to be done with the prompt.
        dialect: what the model's template knows.
        variables: for the template.

    Raises:
        InvalidRequest: the template refuses it, or it is too long.
    """
    try:
        text = conversation.rendered(runtime.tokenizer, dialect, variables)
        return _encoded(runtime, body, text, add_special_tokens=bool(body.add_special_tokens)), text
    except InvalidRequest as error:
        name = body.prompt_name if error.parameter in ("messages", "prompt") else error.parameter
        raise type(error)(str(error), name) from error


def spoken_prompt(
    runtime: Runtime,
    body: SpokenRequest,
    conversation: Conversation,
    dialect: Dialect,
    variables: Mapping[str, Any],
) -> tuple[list[int], Speech, SamplingParams]:
    """The token ids of a conversation, how what comes of it is read, and how that is generated.

    Raises:
        InvalidRequest: as `chat_prompt`, or tools are not taken, or a parameter is out of range.
    """
    ids, text = chat_prompt(runtime, body, conversation, dialect, variables)
    try:
        speech = speech_for(body, dialect, text)
    except InvalidRequest as error:
        raise body.in_its_words(error) from error
    return ids, speech, body.sampling(runtime.has_tokenizer, speech)


def completion_prompts(runtime: Runtime, body: CompletionRequest) -> list[list[int]]:
    """The token ids of all prompts. Raises InvalidRequest for one that is too long, or is no text."""
    add_special_tokens = body.add_special_tokens is not False
    return [
        _encoded(runtime, body, prompt, add_special_tokens)
        if isinstance(prompt, str)
        else cut(runtime, body, prompt)
        for prompt in body.prompts
    ]


def echoed_prompts(runtime: Runtime, body: CompletionRequest) -> tuple[list[list[int]], list[str] | None]:
    """As `completion_prompts`, and with `echo` their texts: as they were given, or what their ids say.

    Raises:
        InvalidRequest: see there; or there is no tokenizer to make text of them.
    """
    prompts = completion_prompts(runtime, body)
    if not body.echo:
        return prompts, None
    if not runtime.has_tokenizer:
        raise InvalidRequest("echo is for text, and this model has no tokenizer: leave it out", "echo")
    return prompts, [
        given
        if isinstance(given, str) and body.truncate_prompt_tokens is None
        else runtime.tokenizer.decode(ids)
        for given, ids in zip(body.prompts, prompts, strict=True)
    ]


def _encoded(runtime: Runtime, body: GenerationRequest, text: str, add_special_tokens: bool) -> list[int]:
    if body.truncate_prompt_tokens is None:
        return runtime.encode(text, add_special_tokens)
    # Not `Runtime.encode`, which refuses what is too long before it is cut. The body bounds the text.
    return cut(runtime, body, runtime.tokenizer.encode(text, add_special_tokens))


def cut(runtime: Runtime, body: GenerationRequest, ids: list[int]) -> list[int]:
    """The end of a prompt, as long as the body wants it."""
    length = body.truncate_prompt_tokens
    if length is None:
        return ids
    if length == -1:
        length = max(1, runtime.max_request_len - body.num_output_reserved)
    return ids[-length:]
