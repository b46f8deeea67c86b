"""Pydantic AI's function model, following the plan; run in the example's environment."""

from plan import next_step
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart, ToolReturnPart
from pydantic_ai.models.function import AgentInfo, FunctionModel


def scripted(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    parts = [part for message in messages for part in message.parts]
    step = next_step([part.model_response_str() for part in parts if isinstance(part, ToolReturnPart)])
    return ModelResponse(parts=[TextPart(step) if isinstance(step, str) else ToolCallPart(*step)])


MODEL = FunctionModel(scripted)
