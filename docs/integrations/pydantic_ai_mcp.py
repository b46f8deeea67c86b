"""A Pydantic AI agent whose code runs in Sandgate.

SANDGATE_URL=… SANDGATE_API_KEY=… MODEL=openai:gpt-5-mini OPENAI_API_KEY=… python pydantic_ai_mcp.py "What is 2 ** 100?"
"""

import asyncio
import os
import sys

from pydantic_ai import Agent
from pydantic_ai.mcp import MCPToolset
from pydantic_ai.models import Model

INSTRUCTIONS = (
    "Compute with execute_code instead of guessing; pass session_id to go on where you were, and end_session last."
)


def sandgate() -> MCPToolset:
    return MCPToolset(
        os.environ["SANDGATE_URL"] + "/mcp",
        headers={"Authorization": f"Bearer {os.environ['SANDGATE_API_KEY']}"},
        read_timeout=60,  # Sandgate answers within 45 s
        tool_error_behavior="failed",  # code that raises is something to read, not a fault that uses up the retries
    )


async def ask(model: str | Model, question: str) -> str:
    """What the agent answers; whatever it ran is on record in Sandgate."""
    async with Agent(model, instructions=INSTRUCTIONS, toolsets=[sandgate()]) as agent:
        return (await agent.run(question)).output


if __name__ == "__main__":
    print(asyncio.run(ask(os.environ["MODEL"], sys.argv[1])))
