"""Applications' own clients against the real service: a small question over a page, with a tool, through each."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest

from tests.live import SMALL, Process, process

pytestmark = pytest.mark.model

MODEL = "smollm2-135m-instruct"
PAGE = "The lighthouse at Grey Point was built in 1874. Its tower is 31 metres tall."
QUESTION = f"Answer from this text: {PAGE}\nHow tall is the tower, in metres? Answer with the number alone."


@pytest.fixture(scope="module")
def service() -> Iterator[Process]:
    with process(*SMALL) as found:
        found.wait_ready()
        yield found


def test_langchain_answers_over_a_page_and_calls_a_tool(service: Process) -> None:
    langchain: Any = import_module("langchain_openai")
    prompts: Any = import_module("langchain_core.prompts")
    model = langchain.ChatOpenAI(
        model=MODEL, base_url=f"{service.url}/v1", api_key="any", temperature=0, max_tokens=160
    )
    chain = prompts.ChatPromptTemplate.from_messages([("system", "Answer briefly."), ("user", "{question}")]) | model
    assert "31" in chain.invoke({"question": QUESTION}).content
    assert "31" in "".join(chunk.content for chunk in chain.stream({"question": QUESTION}))

    def height_of(building: str) -> str:
        """How tall a building is."""
        return "31 metres"

    caller = model.bind_tools([height_of], tool_choice="required", parallel_tool_calls=False)
    answer = caller.invoke(QUESTION)
    assert {call["name"] for call in answer.tool_calls} == {"height_of"}
    assert "building" in answer.tool_calls[0]["args"]
    messages: Any = import_module("langchain_core.messages")
    results = [messages.ToolMessage("31 metres", tool_call_id=call["id"]) for call in answer.tool_calls]
    assert isinstance(model.invoke([messages.HumanMessage(QUESTION), answer, *results]).content, str)


def test_llamaindex_answers_over_a_page_and_calls_a_tool(service: Process) -> None:
    llms: Any = import_module("llama_index.llms.openai_like")
    core: Any = import_module("llama_index.core.llms")
    tools: Any = import_module("llama_index.core.tools")
    model = llms.OpenAILike(
        model=MODEL,
        api_base=f"{service.url}/v1",
        api_key="any",
        is_chat_model=True,
        is_function_calling_model=True,
        context_window=4096,
        temperature=0.0,
        max_tokens=160,
    )
    asked = [core.ChatMessage(role="user", content=QUESTION)]
    assert "31" in (model.chat(asked).message.content or "")
    assert "31" in "".join(chunk.delta or "" for chunk in model.stream_chat(asked))

    def height_of(building: str) -> str:
        """How tall a building is."""
        return "31 metres"

    answer = model.chat_with_tools([tools.FunctionTool.from_defaults(height_of)], user_msg=QUESTION, tool_required=True)
    (call, *_) = model.get_tool_calls_from_response(answer)
    assert (call.tool_name, set(call.tool_kwargs)) == ("height_of", {"building"})
