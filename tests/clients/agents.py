"""Agents by client libraries: the model is asked, calls, is told what came of it, and answers.

Run by `test_clients.py` in an environment that has them: `python -m tests.clients.agents NAME URL MODEL`.
What is called is left to the model, so that it must be one that can choose: the fake one is told what to say.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from tests.clients.cities import HOW_MANY, IN_ROME, QUESTION, City, Name, Program, population, run, weather

ASKED: Any = [{"role": "user", "content": HOW_MANY}]


def openai_client(url: str, model: str) -> dict[str, Any]:
    import openai
    from pydantic import BaseModel

    class Population(BaseModel):
        city: Name

    api = openai.OpenAI(base_url=url, api_key="any", max_retries=0)
    tool: Any = openai.pydantic_function_tool(Population, name="population")

    def chats() -> Any:
        messages = list(ASKED)
        with api.chat.completions.stream(model=model, messages=messages, tools=[tool]) as stream:
            choice = stream.get_final_completion().choices[0]
        messages.append(choice.message)
        for call in choice.message.tool_calls or []:
            arguments: Any = call.function.parsed_arguments
            messages.append({"role": "tool", "tool_call_id": call.id, "content": population(arguments.city)})
        answer = api.chat.completions.create(model=model, messages=messages, tools=[tool])
        return choice.finish_reason, choice.message.content, answer.choices[0].message.content

    def responses() -> Any:
        flat: Any = {"type": "function", **tool["function"]}
        items: list[Any] = list(ASKED)
        with api.responses.stream(model=model, input=items, tools=[flat]) as stream:
            begun = stream.get_final_response()
        for item in begun.output:
            items.append(item)
            if item.type == "function_call":
                result = population(json.loads(item.arguments)["city"])
                items.append({"type": "function_call_output", "call_id": item.call_id, "output": result})
        return api.responses.create(model=model, input=items, tools=[flat]).output_text

    return {"chats": chats(), "responses": responses()}


def langchain(url: str, model: str) -> dict[str, Any]:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI
    from langgraph.prebuilt import create_react_agent

    chat = ChatOpenAI(model=model, base_url=url, api_key="any", max_retries=0)
    tools = [tool(population), tool(weather)]
    bound = chat.bind_tools(tools)
    messages: list[Any] = [HumanMessage(HOW_MANY)]
    called = bound.invoke(messages)
    first, *others = bound.stream(messages)
    streamed: Any = first
    for chunk in others:
        streamed += chunk
    messages.append(called)
    for call in called.tool_calls:
        messages.append(ToolMessage(tools[0].invoke(call["args"]), tool_call_id=call["id"]))
    agent = create_react_agent(chat, tools)
    asked = {"messages": [("user", HOW_MANY)]}
    broken = bound.invoke(IN_ROME)
    told = ToolMessage("That is no JSON.", tool_call_id=broken.invalid_tool_calls[0]["id"])
    mended = bound.invoke([HumanMessage(IN_ROME), broken, told])
    json_mode = chat.with_structured_output(City, method="json_mode").invoke(QUESTION)
    return {
        "called": [(call["name"], call["args"]) for call in called.tool_calls],
        "streamed": [(call["name"], call["args"]) for call in streamed.tool_calls],
        "content": [called.content, streamed.content],
        "reason": called.response_metadata["finish_reason"],
        "answer": bound.invoke(messages).content,
        "mended": [(call["name"], call["args"]) for call in mended.tool_calls],
        "agent": agent.invoke(asked)["messages"][-1].content,
        "agent, streamed": list(agent.stream(asked, stream_mode="values"))[-1]["messages"][-1].content,
        "json_mode": json_mode.model_dump(),
    }


def llama_index(url: str, model: str) -> dict[str, Any]:
    from llama_index.core.agent.workflow import FunctionAgent
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    chat = OpenAILike(
        model=model, api_base=url, api_key="any", max_retries=0, is_chat_model=True,
        is_function_calling_model=True, context_window=16384,
    )  # fmt: skip
    tools: list[Any] = [FunctionTool.from_defaults(population), FunctionTool.from_defaults(weather)]

    async def ask_agent() -> str:
        return str(await FunctionAgent(tools=tools, llm=chat).run(HOW_MANY))

    streamed = list(chat.stream_chat_with_tools(tools, user_msg=HOW_MANY))[-1]
    calls = chat.get_tool_calls_from_response(streamed)
    return {
        "predict_and_call": chat.predict_and_call(tools, HOW_MANY).response,
        "streamed": [(call.tool_name, call.tool_kwargs) for call in calls],
        "agent": asyncio.run(ask_agent()),
    }


def pydantic_ai(url: str, model: str) -> dict[str, Any]:
    from pydantic_ai import Agent, PromptedOutput, Tool
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=url, api_key="any")
    chat = OpenAIChatModel(model, provider=provider)
    agent = Agent(chat, tools=[population, weather])
    kinds: set[str] = set()

    async def watch(context: Any, events: Any) -> None:
        kinds.update([event.event_kind async for event in events])

    loose = Agent(chat, tools=[Tool(population, strict=False)])
    typed = Agent(chat, tools=[population], output_type=[City, str])
    prompted = Agent(chat, output_type=PromptedOutput(City))
    responses = Agent(OpenAIResponsesModel(model, provider=provider), tools=[population])
    return {
        "agent": agent.run_sync(HOW_MANY).output,
        "streamed": agent.run_sync(HOW_MANY, event_stream_handler=watch).output,
        "events": sorted(kinds),
        "agent, mended": loose.run_sync(IN_ROME).output,
        "agent with a type": typed.run_sync(HOW_MANY).output,
        "responses": responses.run_sync(HOW_MANY).output,
        "prompted": prompted.run_sync(QUESTION).output.model_dump(),
    }


def instructor(url: str, model: str) -> dict[str, Any]:
    import instructor as library
    import openai

    def api(mode: Any) -> Any:
        return library.from_openai(openai.OpenAI(base_url=url, api_key="any", max_retries=0), mode=mode)

    options: dict[str, Any] = {
        "model": model, "messages": [{"role": "user", "content": QUESTION}], "response_model": City,
    }  # fmt: skip
    modes = library.Mode
    partial = list(api(modes.TOOLS).chat.completions.create_partial(**options))
    return {
        "JSON": api(modes.JSON).chat.completions.create(max_retries=0, **options).model_dump(),
        "MD_JSON": api(modes.MD_JSON).chat.completions.create(max_retries=0, **options).model_dump(),
        "partial": partial[-1].model_dump(),
    }


def litellm(url: str, model: str) -> dict[str, Any]:
    import litellm as library
    import openai
    from pydantic import BaseModel

    class Population(BaseModel):
        city: Name

    options: dict[str, Any] = {
        "model": f"openai/{model}", "api_base": url, "api_key": "any", "num_retries": 0,
        "tools": [openai.pydantic_function_tool(Population, name="population")],
    }  # fmt: skip
    chunks = list(library.completion(messages=ASKED, stream=True, **options))
    streamed = library.stream_chunk_builder(chunks, messages=ASKED).choices[0].message
    message = library.completion(messages=ASKED, **options).choices[0].message
    messages = [*ASKED, message]
    for call in message.tool_calls:
        result = population(json.loads(call.function.arguments)["city"])
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    answer = library.completion(messages=messages, **options)
    return {
        "called": [(call.function.name, call.function.arguments) for call in message.tool_calls],
        "streamed": [(call.function.name, call.function.arguments) for call in streamed.tool_calls],
        "answer": answer.choices[0].message.content,
    }


PROGRAMS: dict[str, Program] = {
    program.__name__: program
    for program in (openai_client, langchain, llama_index, pydantic_ai, instructor, litellm)
}

if __name__ == "__main__":
    run(PROGRAMS)
