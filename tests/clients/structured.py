"""Structured output by client libraries, in each of their ways, as their documentation has them.

Run by `test_clients.py` in an environment that has them: `python -m tests.clients.structured NAME URL MODEL`.
All of it is held by the server to a schema or to a call, so that any model answers with a city.
"""

from __future__ import annotations

from typing import Any

from tests.clients.cities import QUESTION, City, Program, run

MAX_TOKENS = 200
"""A token of the fake model is a byte."""
ASKED: Any = [{"role": "user", "content": QUESTION}]


def openai_client(url: str, model: str) -> dict[str, Any]:
    import openai

    api = openai.OpenAI(base_url=url, api_key="any", max_retries=0)
    chats = api.chat.completions
    tools = [openai.pydantic_function_tool(City)]
    options: Any = {"model": model, "messages": ASKED, "max_tokens": MAX_TOKENS, "temperature": 0}
    with chats.stream(response_format=City, **options) as stream:
        streamed = stream.get_final_completion().choices[0].message.parsed
    called = chats.parse(tools=tools, tool_choice="required", parallel_tool_calls=False, **options)
    named: Any = {"type": "function", "function": {"name": "City"}}
    with chats.stream(tools=tools, tool_choice=named, **options) as stream:
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or []
    answer = api.responses.parse(
        model=model, input=QUESTION, text_format=City, max_output_tokens=MAX_TOKENS, temperature=0
    )
    found = {
        "parse": chats.parse(response_format=City, **options).choices[0].message.parsed,
        "stream": streamed,
        "tools": called.choices[0].message.tool_calls[0].function.parsed_arguments,
        "streamed tools": call.function.parsed_arguments,
        "responses": answer.output_parsed,
    }
    return dumped(found)


def langchain(url: str, model: str) -> dict[str, Any]:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(
        model=model, base_url=url, api_key="any", max_retries=0, max_tokens=MAX_TOKENS, temperature=0
    )
    found: dict[str, Any] = {}
    for method in ("function_calling", "json_schema"):
        held = chat.with_structured_output(City, method=method)
        found[method] = held.invoke(QUESTION)
        found[f"{method}, streamed"] = list(held.stream(QUESTION))[-1]
    strict = chat.with_structured_output(City, method="function_calling", strict=True)
    found["function_calling, strict"] = strict.invoke(QUESTION)
    bound = chat.bind_tools([City], tool_choice="any").invoke(QUESTION)
    found["bind_tools"] = City(**bound.tool_calls[0]["args"])
    answer = chat.with_structured_output(City, method="json_mode", include_raw=True).invoke(QUESTION)
    return dumped(found) | {"json_mode": answer["raw"].content}


def llama_index(url: str, model: str) -> dict[str, Any]:
    from llama_index.core.llms import ChatMessage
    from llama_index.core.prompts import PromptTemplate
    from llama_index.llms.openai_like import OpenAILike

    chat = OpenAILike(
        model=model, api_base=url, api_key="any", max_retries=0, max_tokens=MAX_TOKENS, temperature=0,
        is_chat_model=True, is_function_calling_model=True,
    )  # fmt: skip
    found = {
        "structured_predict": chat.structured_predict(City, PromptTemplate(QUESTION)),
        "as_structured_llm": chat.as_structured_llm(City)
        .chat([ChatMessage(role="user", content=QUESTION)])
        .raw,
    }
    return dumped(found)


def pydantic_ai(url: str, model: str) -> dict[str, Any]:
    from pydantic_ai import Agent, NativeOutput, ToolOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    chat = OpenAIChatModel(model, provider=OpenAIProvider(base_url=url, api_key="any"))
    settings: Any = {"max_tokens": MAX_TOKENS, "temperature": 0.0}

    def ask(output_type: Any) -> City:
        agent: Agent[None, City] = Agent(chat, output_type=output_type, model_settings=settings, retries=0)
        return agent.run_sync(QUESTION).output

    return dumped({"type": ask(City), "tool": ask(ToolOutput(City)), "native": ask(NativeOutput(City))})


def instructor(url: str, model: str) -> dict[str, Any]:
    import instructor as library
    import openai

    def ask(mode: Any) -> Any:
        api = library.from_openai(openai.OpenAI(base_url=url, api_key="any", max_retries=0), mode=mode)
        return api.chat.completions.create(
            model=model, messages=list(ASKED), response_model=City, max_retries=0,
            max_tokens=MAX_TOKENS, temperature=0,
        )  # fmt: skip

    modes = ("TOOLS", "TOOLS_STRICT", "JSON_SCHEMA")
    return dumped({mode: ask(getattr(library.Mode, mode)) for mode in modes})


def litellm(url: str, model: str) -> dict[str, Any]:
    import litellm as library
    import openai

    options: dict[str, Any] = {
        "model": f"openai/{model}", "api_base": url, "api_key": "any", "num_retries": 0,
        "messages": ASKED, "max_tokens": MAX_TOKENS, "temperature": 0,
    }  # fmt: skip
    tool = openai.pydantic_function_tool(City)
    called = library.completion(tools=[tool], tool_choice="required", parallel_tool_calls=False, **options)
    streamed = library.completion(response_format=City, stream=True, **options)
    held = library.completion(response_format=City, **options).choices[0].message.content
    texts = {
        "format": held,
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in streamed),
        "tools": called.choices[0].message.tool_calls[0].function.arguments,
    }
    return dumped({way: City.model_validate_json(text) for way, text in texts.items()})


def dumped(found: dict[str, Any]) -> dict[str, Any]:
    """Cities as JSON; what is none, is told."""
    return {
        way: city.model_dump() if isinstance(city, City) else f"no city: {city!r}"
        for way, city in found.items()
    }


PROGRAMS: dict[str, Program] = {
    program.__name__: program
    for program in (openai_client, langchain, llama_index, pydantic_ai, instructor, litellm)
}

if __name__ == "__main__":
    run(PROGRAMS)
