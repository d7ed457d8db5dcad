"""The shapes of answers, for the OpenAPI document. Tests compare them with what is sent."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from tpworker.outputs import RuntimeState


class _Shape(BaseModel):
    """All of the fields, and no other ones."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ErrorDetail(_Shape):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(_Shape):
    """Of whatever is refused, or fails."""

    error: ErrorDetail


class PromptTokensDetails(_Shape):
    cached_tokens: int


class CompletionTokensDetails(_Shape):
    reasoning_tokens: int


class Usage(_Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails = CompletionTokensDetails(reasoning_tokens=0)
    """Of chats with a model that thinks, where its thinking ends with one token."""


class TopLogprob(_Shape):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Shape):
    content: list[ChatTokenLogprob]
    refusal: None


class CompletionLogprobs(_Shape):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class PromptLogprob(_Shape):
    logprob: float
    rank: int | None
    decoded_token: str


class _Choice(_Shape):
    index: int
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None


class CompletionChoice(_Choice):
    text: str
    logprobs: CompletionLogprobs | None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    """With prompt_logprobs: by token id."""
    prompt_token_ids: list[int] = []
    """With return_token_ids."""
    token_ids: list[int] = []
    """With return_token_ids."""


class Completion(_Shape):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CalledFunction(_Shape):
    name: str
    arguments: str
    """JSON, but for what the model got wrong, or was cut."""


class ToolCall(_Shape):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(_Shape):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str = ""
    """What the model thought, if it did."""
    reasoning: str = ""
    """The same."""
    tool_calls: list[ToolCall] = []
    """What it calls, if it does."""


class ChatChoice(_Choice):
    finish_reason: Literal["stop", "length", "tool_calls"]  # type: ignore[assignment]  # one more
    message: ChatMessage
    logprobs: ChatLogprobs | None
    token_ids: list[int] = []
    """With return_token_ids."""


class ChatCompletion(_Shape):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    """With prompt_logprobs: by token id."""
    prompt_token_ids: list[int] = []
    """With return_token_ids."""


class OutputText(_Shape):
    type: Literal["output_text"]
    text: str
    annotations: list[None]
    logprobs: list[None]


class OutputMessage(_Shape):
    id: str
    type: Literal["message"]
    status: Literal["completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class ReasoningText(_Shape):
    type: Literal["reasoning_text"]
    text: str


class OutputReasoning(_Shape):
    id: str
    type: Literal["reasoning"]
    status: Literal["completed", "incomplete"]
    summary: list[None]
    content: list[ReasoningText]


class OutputCall(_Shape):
    id: str
    type: Literal["function_call"]
    status: Literal["completed", "incomplete"]
    call_id: str
    name: str
    arguments: str
    """JSON, but for what the model got wrong, or was cut."""


class RepeatedTool(_Shape):
    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool


class RepeatedReasoning(_Shape):
    effort: str | None
    summary: None


class InputTokensDetails(_Shape):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(_Shape):
    reasoning_tokens: int


class ResponseUsage(_Shape):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(_Shape):
    reason: Literal["max_output_tokens"]


class ResponseShape(_Shape):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete"]
    background: Literal[False]
    error: None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputMessage | OutputReasoning | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: RepeatedReasoning | None
    store: Literal[False]
    temperature: float | None
    text: dict[Literal["format"], dict[str, Any]]
    tool_choice: str | dict[str, Any]
    tools: list[RepeatedTool]
    top_p: float | None
    truncation: Literal["disabled"]
    usage: ResponseUsage


class Model(_Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class Models(_Shape):
    object: Literal["list"]
    data: list[Model]


class Tokens(_Shape):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None


class Text(_Shape):
    prompt: str


class TokenizerInfo(_Shape):
    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    vocab_size: int
    chat_template: str | None
    model_max_length: int


class Probe(_Shape):
    status: RuntimeState
    error: str = ""
    """With "failed" and "recovering": what happened, on one line."""


class Version(_Shape):
    version: str


class Done(_Shape):
    success: Literal[True]


class IsSleeping(_Shape):
    is_sleeping: bool


class Updated(Done):
    message: str
    num_paused_requests: int
    """How many requests were open: they go on with the new weights."""


class Load(_Shape):
    server_load: int


class TraceBegun(_Shape):
    file: str
    """Its name, in the folder of --trace."""


class Trace(_Shape):
    path: str
    """The file's name, in the folder of --trace."""
    num_events: int
    num_dropped: int
    num_bytes: int
    is_full: bool


class ModelInfo(_Shape):
    model_path: str
    tokenizer_path: str
    is_generation: Literal[True]
    preferred_sampling_params: None
    model_type: str
    architectures: list[str]


class ServerInfo(_Shape):
    model_path: str
    tokenizer_path: str
    served_model_name: str
    tp_size: int
    dp_size: Literal[1]
    context_length: int
    max_running_requests: int
    max_total_num_tokens: int
    device: str
    dtype: str
    quantization: str | None
    version: str


class LoadOfRank(_Shape):
    dp_rank: Literal[0]
    num_reqs: int
    num_waiting_reqs: int
    num_tokens: int


Documented = dict[int | str, dict[str, Any]]
"""What FastAPI takes as `responses`."""

_WHY = {
    400: "The request is refused, or is no JSON.",
    401: "The key is missing, or wrong.",
    404: "There is no such model here.",
    409: "A timeline is being written, or none is.",
    408: "The body did not come in time.",
    413: "The body is too long.",
    415: "The body is compressed.",
    429: "As many requests wait as may: try again later.",
    500: "A bug: the log says more.",
    503: "Not ready, or failed, or full: try again later.",
}
GUARDED = (400, 401, 408, 413, 415, 500, 503)
"""The errors of what is behind the key."""
GENERATES = (*GUARDED, 404, 429)
"""The errors of what runs a model, or its tokenizer."""
TELLS = (*GUARDED, 404)
"""Of what tells of the model."""


def documented(*statuses: int, ok: type[Any] | None = None, streams: bool = False) -> Documented:
    """The answers of a route: errors of these statuses, and `ok` with status 200, or events if it streams."""
    described: Documented = {
        status: {"model": Error, "description": _WHY[status]} for status in sorted(statuses)
    }
    if ok is not None:
        events: dict[str, Any] = {"text/event-stream": {}} if streams else {}
        described[200] = {"model": ok, "description": "The answer.", "content": events}
    return described
