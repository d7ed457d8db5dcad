"""Text by client libraries, whole and streamed, with what else they tell of it.

Run by `test_clients.py` in an environment that has them: `python -m tests.clients.texts NAME URL MODEL`.
"""

from __future__ import annotations

from typing import Any

from tests.clients.cities import Program, run

QUESTION = "Where?"


def langchain(url: str, model: str) -> dict[str, Any]:
    from langchain_openai import ChatOpenAI, OpenAI

    chat = ChatOpenAI(model=model, base_url=url, api_key="any", logprobs=True, top_logprobs=2, max_retries=0)
    answer = chat.invoke(QUESTION)
    streamed = list(chat.stream(QUESTION))
    responses = ChatOpenAI(model=model, base_url=url, api_key="any", use_responses_api=True, max_retries=0)
    text = OpenAI(model=model, base_url=url, api_key="any", max_retries=0, best_of=2)
    return {
        "text": answer.content,
        "streamed": "".join(chunk.content for chunk in streamed),
        "logprobs": [len(one["top_logprobs"]) for one in answer.response_metadata["logprobs"]["content"]],
        "tokens": answer.usage_metadata["output_tokens"],
        "responses": responses.invoke(QUESTION).text,
        "batch": text.batch(["a", "b"]),
    }


def llama_index(url: str, model: str) -> dict[str, Any]:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    options: dict[str, Any] = {"model": model, "api_base": url, "api_key": "any", "max_retries": 0}
    chat = OpenAILike(is_chat_model=True, logprobs=True, top_logprobs=2, **options)
    messages = [ChatMessage(role="user", content=QUESTION)]
    answer = chat.chat(messages)
    return {
        "text": answer.message.content,
        "streamed": "".join(chunk.delta for chunk in chat.stream_chat(messages)),
        "logprobs": [len(tops) for tops in answer.logprobs],
        "completion": OpenAILike(is_chat_model=False, **options).complete("a").text,
    }


def pydantic_ai(url: str, model: str) -> dict[str, Any]:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    agent = Agent(OpenAIChatModel(model, provider=OpenAIProvider(base_url=url, api_key="any")))
    streamed = agent.run_stream_sync(QUESTION)
    return {"text": agent.run_sync(QUESTION).output, "streamed": list(streamed.stream_text())[-1]}


def litellm(url: str, model: str) -> dict[str, Any]:
    import litellm as library

    options: dict[str, Any] = {"api_base": url, "api_key": "any", "num_retries": 0}
    asked: dict[str, Any] = {
        "model": f"openai/{model}", "messages": [{"role": "user", "content": QUESTION}],
        "logprobs": True, "top_logprobs": 2, **options,
    }  # fmt: skip
    answer = library.completion(n=2, **asked)
    *chunks, last = library.completion(stream=True, stream_options={"include_usage": True}, **asked)
    text = library.text_completion(model=f"text-completion-openai/{model}", prompt="a", logprobs=1, **options)
    return {
        "texts": [choice.message.content for choice in answer.choices],
        "logprobs": [len(one.top_logprobs) for one in answer.choices[0].logprobs.content],
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
        "tokens": last.usage.completion_tokens,
        "completion": text.choices[0].text,
    }


PROGRAMS: dict[str, Program] = {
    program.__name__: program for program in (langchain, llama_index, pydantic_ai, litellm)
}

if __name__ == "__main__":
    run(PROGRAMS)
