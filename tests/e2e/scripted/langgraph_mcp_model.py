"""A chat model of LangChain that follows the plan; run in the example's environment."""

from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from plan import next_step


class Scripted(BaseChatModel):
    @property
    def _llm_type(self) -> str:
        return "scripted"

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        told = [message.text for message in messages if isinstance(message, ToolMessage)]
        step = next_step(told)
        if isinstance(step, str):
            said = AIMessage(step)
        else:
            tool, arguments = step
            said = AIMessage("", tool_calls=[{"name": tool, "args": arguments, "id": str(len(told))}])
        return ChatResult(generations=[ChatGeneration(message=said)])


MODEL = Scripted()
