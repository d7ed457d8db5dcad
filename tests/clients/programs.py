"""Programs of client libraries, each in few lines as their documentation has them.

Run by `test_clients.py` in an environment that has them: `python programs.py NAME BASE_URL` prints JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

MODEL = "fake-model"
QUESTION = "Where?"


def langchain(url: str) -> dict[str, Any]:
    from langchain_openai import ChatOpenAI, OpenAI

    chat = ChatOpenAI(model=MODEL, base_url=url, api_key="any", logprobs=True, top_logprobs=2, max_retries=0)
    answer = chat.invoke(QUESTION)
    streamed = list(chat.stream(QUESTION))
    responses = ChatOpenAI(model=MODEL, base_url=url, api_key="any", use_responses_api=True, max_retries=0)
    text = OpenAI(model=MODEL, base_url=url, api_key="any", max_retries=0, best_of=2)
    return {
        "text": answer.content,
        "streamed": "".join(chunk.content for chunk in streamed),
        "logprobs": [len(one["top_logprobs"]) for one in answer.response_metadata["logprobs"]["content"]],
        "tokens": answer.usage_metadata["output_tokens"],
        "responses": responses.invoke(QUESTION).text,
        "batch": text.batch(["a", "b"]),
    }


def llama_index(url: str) -> dict[str, Any]:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    options: dict[str, Any] = {"model": MODEL, "api_base": url, "api_key": "any", "max_retries": 0}
    chat = OpenAILike(is_chat_model=True, logprobs=True, top_logprobs=2, **options)
    messages = [ChatMessage(role="user", content=QUESTION)]
    answer = chat.chat(messages)
    return {
        "text": answer.message.content,
        "streamed": "".join(chunk.delta for chunk in chat.stream_chat(messages)),
        "logprobs": [len(tops) for tops in answer.logprobs],
        "completion": OpenAILike(is_chat_model=False, **options).complete("a").text,
    }


def pydantic_ai(url: str) -> dict[str, Any]:
    from pydantic_ai import Agent
    from pydantic_ai.exceptions import ModelHTTPError
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=url, api_key="any"))
    try:
        Agent(model, output_type=list[str]).run_sync(QUESTION)
        refused = ""
    except ModelHTTPError as error:
        refused = error.body["message"]  # type: ignore[index,call-overload]
    streamed = Agent(model).run_stream_sync(QUESTION)
    return {
        "text": Agent(model).run_sync(QUESTION).output,
        "streamed": list(streamed.stream_text())[-1],
        "refused": refused,
    }


def instructor(url: str) -> dict[str, Any]:
    import instructor as library
    import openai
    from pydantic import BaseModel

    class City(BaseModel):
        name: str

    def ask(mode: Any) -> Any:
        api = library.from_openai(openai.OpenAI(base_url=url, api_key="any", max_retries=0), mode=mode)
        messages: Any = [{"role": "user", "content": 'Say {"name": "Paris"}'}]
        return api.chat.completions.create(model=MODEL, messages=messages, response_model=City, max_retries=0)

    try:
        ask(library.Mode.TOOLS)
        refused = ""
    except Exception as error:  # of the library, around the client's
        refused = str(error)
    return {"name": ask(library.Mode.MD_JSON).name, "refused": refused}


PROGRAMS: dict[str, Callable[[str], dict[str, Any]]] = {
    program.__name__: program for program in (langchain, llama_index, pydantic_ai, instructor)
}

if __name__ == "__main__":
    print(json.dumps(PROGRAMS[sys.argv[1]](sys.argv[2])))
