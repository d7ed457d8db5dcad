"""The bodies of requests: which parameters there are, and that no other one is silently ignored.

A parameter that would change the output and is not supported is refused by name, unless it has the value
that changes nothing; so is one that nobody knows. Some change nothing here and are accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WrapValidator, model_validator

from tpworker.chat.variables import check_variables
from tpworker.config import SamplingParams
from tpworker.errors import InvalidRequest

Prompt = str | list[int]

MAX_PROMPTS = 2048
MAX_STOP_CHARS = 1024

_ACCEPTED = frozenset(
    [
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "parallel_tool_calls",
    ]
)

#: Not supported: each with the values, besides null, that ask for nothing.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "prompt_logprobs": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "truncate_prompt_tokens": (),
    "priority": (0,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "return_token_ids": (False,),
}
_NEUTRAL_COMPLETION: Mapping[str, tuple[object, ...]] = {
    **_NEUTRAL,
    "logprobs": (),  # 0 asks for the chosen token's
    "echo": (False,),
    "suffix": ("",),
}
_NEUTRAL_CHAT: Mapping[str, tuple[object, ...]] = {
    **_NEUTRAL,
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": (),
}
_NEUTRAL_MESSAGE: Mapping[str, tuple[object, ...]] = {
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "refusal": ("",),
    "audio": (),
    "annotations": ([],),
}


def _is_neutral(value: object, neutral: tuple[object, ...]) -> bool:
    same_kind = [n for n in neutral if isinstance(n, bool) == isinstance(value, bool)]  # True == 1
    return value is None or value in same_kind


class _Body(BaseModel):
    """Strict: "5" is no number and 1 is no truth. An optional field may also be null."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    _neutral: ClassVar[Mapping[str, tuple[object, ...]]]

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in cls._neutral:
                if not _is_neutral(value, cls._neutral[name]):
                    raise InvalidRequest(f"{name} is not supported: leave it out", parameter=name)
            elif name not in _ACCEPTED:
                raise InvalidRequest(f"{name!r} is not a parameter here", parameter=name)
        return kept


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    include_usage: bool | None = None
    """Whether a last chunk without choices tells the token counts of the whole request."""
    include_obfuscation: bool | None = None
    """Random padding against traffic analysis; none is sent, whatever is asked."""


StopString = Annotated[str, Field(max_length=MAX_STOP_CHARS)]


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class GenerationRequest(_Body):
    """What both endpoints take."""

    model: str | None = None
    """The served model's name; may be left out."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_tokens: int | None = None
    seed: int | None = None
    stop: Annotated[list[StopString] | None, BeforeValidator(_as_list)] = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @model_validator(mode="after")
    def _only_with_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "stream_options has no effect without stream=true", parameter="stream_options"
            )
        return self

    def _sampling(self, max_tokens: int | None, detokenize: bool) -> SamplingParams:
        if self.stop and not detokenize:
            raise InvalidRequest(
                "stop strings are for text, and this model has no tokenizer: use stop_token_ids",
                parameter="stop",
            )
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_tokens=self.min_tokens or 0,
            seed=self.seed,
            stop=self.stop or (),
            stop_token_ids=self.stop_token_ids or (),
            ignore_eos=bool(self.ignore_eos),
            detokenize=detokenize,
        )


def _as_prompts(prompt: Any) -> list[Prompt]:
    """One or several prompts, as text or as token ids, each checked to be one of these."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if _all_ints(prompt):
            return [prompt]
        if len(prompt) > MAX_PROMPTS:
            raise ValueError(
                f"{len(prompt)} prompts are more than the {MAX_PROMPTS} that one request may have"
            )
        if all(isinstance(p, str) for p in prompt) or all(
            isinstance(p, list) and _all_ints(p) for p in prompt
        ):
            return prompt
    raise ValueError("it should be a string, a list of strings, a list of token ids, or a list of such lists")


def _all_ints(values: list[Any]) -> bool:
    return {int}.issuperset(map(type, values))


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions."""

    _neutral = _NEUTRAL_COMPLETION
    default_max_tokens: ClassVar[int | None] = 16  # the OpenAI API's own

    prompt: Annotated[Any, BeforeValidator(_as_prompts)]
    """Text or token ids; a list of either gives one choice each."""

    @property
    def prompts(self) -> list[Prompt]:
        prompts: list[Prompt] = self.prompt
        return prompts

    def sampling(self, detokenize: bool = True) -> SamplingParams:
        """Raises InvalidRequest for a value out of range. False: the model has no tokenizer."""
        return self._sampling(self.max_tokens, detokenize)


class TextPart(BaseModel):
    """A part of a message's content; there are only texts."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    type: Literal["text"]
    text: str


class Message(_Body):
    """A turn of a conversation."""

    _neutral = _NEUTRAL_MESSAGE

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], WrapValidator(lambda c, check: c if type(c) is str else check(c))]
    """Or a string, which stays one."""
    name: str | None = None
    reasoning_content: str | None = None

    @property
    def num_chars(self) -> int:
        """Of its content."""
        content: str | list[TextPart] = self.content
        return len(content) if isinstance(content, str) else sum(len(part.text) for part in content)

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it: the developer called the system. The content as it came."""
        content: str | list[TextPart] = self.content
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": content if isinstance(content, str) else [part.model_dump() for part in content],
        }
        extra = {"name": self.name, "reasoning_content": self.reasoning_content}
        return message | {name: value for name, value in extra.items() if value is not None}


class ChatRequest(GenerationRequest):
    """The body of /v1/chat/completions."""

    _neutral = _NEUTRAL_CHAT
    default_max_tokens: ClassVar[int | None] = None  # as many as fit

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    """The newer name of max_tokens."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the model's chat template, e.g. {"enable_thinking": false}."""

    @property
    def num_chars(self) -> int:
        """Of all messages together."""
        return sum(message.num_chars for message in self.messages)

    @model_validator(mode="after")
    def _variables_can_be_given(self) -> ChatRequest:
        check_variables(self.chat_template_kwargs or {})
        return self

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequest(
                f"max_tokens={self.max_tokens} and max_completion_tokens={self.max_completion_tokens} "
                "mean the same: give one",
                parameter="max_completion_tokens",
            )
        return self

    def sampling(self, detokenize: bool = True) -> SamplingParams:
        """As that of `CompletionRequest`."""
        if self.max_completion_tokens is None:
            return self._sampling(self.max_tokens, detokenize)
        try:
            return self._sampling(self.max_completion_tokens, detokenize)
        except InvalidRequest as error:
            if error.parameter != "max_tokens":
                raise
            raise InvalidRequest(
                str(error).replace("max_tokens", "max_completion_tokens"), "max_completion_tokens"
            ) from error
