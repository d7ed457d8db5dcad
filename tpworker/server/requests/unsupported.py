"""The parameters that would change the output and are not supported: each with the values that ask nothing.

Null asks for nothing, always. Whatever else is given of them is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping

Neutral = Mapping[str, tuple[object, ...]]

_GENERATION: Neutral = {
    "length_penalty": (1,),
    "thinking_token_budget": (),
    "reasoning_max_tokens": (),
    "use_beam_search": (False,),
    "spaces_between_special_tokens": (True,),
    # Of vLLM, SGLang, FastDeploy and llama.cpp, whose clients expect them to do something.
    "kv_transfer_params": (),
    "logits_processors": ([],),
    "lora_path": (),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "no_stop_trim": (False,),
    "prompt_embeds": (),
    "return_hidden_states": (False,),
    "stop_regex": ([],),
    "top_a": (0,),
    "typical_p": (1,),
    "vllm_xargs": ({},),
}
COMPLETION: Neutral = {
    **_GENERATION,
    "suffix": ("",),
}
CHAT: Neutral = {
    **_GENERATION,
    "best_of": (1,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "thinking": (),
    "verbosity": (),
    "web_search_options": (),
    "echo": (False,),
    "chat_template": (),
    "documents": (),
    "mm_processor_kwargs": (),
}
RESPONSES: Neutral = {
    **_GENERATION,
    "background": (False,),
    "best_of": (1,),
    "context_management": ([],),
    "conversation": (),
    "echo": (False,),
    "image": (),
    "include": ([],),
    "logprobs": (False,),
    "max_tool_calls": (),
    "moderation": (),
    "n": (1,),
    "previous_response_id": (),
    "prompt": (),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
TOKENIZE: Neutral = {
    "chat_template": (),
    "documents": (),
    "mm_processor_kwargs": (),
}
MESSAGE: Neutral = {
    "function_call": (),
    "refusal": ("",),
    "audio": (),
    "annotations": ([],),
}

REMEDIES: Mapping[str, str] = {
    "chat_template": "the server's own is used (--chat-template)",
    "previous_response_id": "nothing is kept here, give the whole conversation as input",
    "conversation": "nothing is kept here, give the whole conversation as input",
    "response_format": "give text.format",
    "thinking": "give enable_thinking, true or false",
    "functions": "give them as tools",
    "function_call": "give tool_choice, and in messages tool_calls",
}
"""What to do instead of leaving one out, if there is anything."""


def is_neutral(value: object, neutral: tuple[object, ...]) -> bool:
    """Whether a value asks for nothing."""
    same_kind = [n for n in neutral if isinstance(n, bool) == isinstance(value, bool)]  # True == 1
    return value is None or value in same_kind
