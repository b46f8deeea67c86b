"""A model of the OpenAI Agents SDK that follows the plan; run in the example's environment."""

import json
from typing import Any

from agents import Model, ModelResponse, Usage
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage, ResponseOutputText
from plan import next_step


class Scripted(Model):
    async def get_response(self, system_instructions: Any, input: Any, *args: Any, **kwargs: Any) -> ModelResponse:
        told = [
            json.dumps(i["output"]) for i in input if isinstance(i, dict) and i.get("type") == "function_call_output"
        ]
        step, number = next_step([text.replace("\\", "") for text in told]), str(len(told))
        if isinstance(step, str):
            text = ResponseOutputText(text=step, type="output_text", annotations=[])
            said: Any = ResponseOutputMessage(
                id=number, content=[text], role="assistant", status="completed", type="message"
            )
        else:
            tool, arguments = step
            said = ResponseFunctionToolCall(
                name=tool, arguments=json.dumps(arguments), call_id=number, type="function_call"
            )
        return ModelResponse(output=[said], usage=Usage(), response_id=None)

    def stream_response(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("The example does not stream.")


MODEL = Scripted()
