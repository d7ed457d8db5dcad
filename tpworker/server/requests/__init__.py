"""The bodies of requests, a file for each endpoint: which parameters there are, and what becomes of others.

A parameter that would change the output and is not supported is refused by name, unless it has the value
that changes nothing. Some change nothing here and are accepted; what nobody knows is ignored, and named.
"""

from tpworker.server.requests.chat import ChatRequest
from tpworker.server.requests.completions import CompletionRequest
from tpworker.server.requests.conversation import Conversation
from tpworker.server.requests.generation import GenerationRequest, Prompt
from tpworker.server.requests.responses import ResponsesRequest
from tpworker.server.requests.spoken import SpokenRequest

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "Conversation",
    "GenerationRequest",
    "Prompt",
    "ResponsesRequest",
    "SpokenRequest",
]
