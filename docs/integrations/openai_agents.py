"""An agent of the OpenAI Agents SDK whose code runs in Sandgate.

SANDGATE_URL=… SANDGATE_API_KEY=… MODEL=gpt-5-mini OPENAI_API_KEY=… python openai_agents.py "What is 2 ** 100?"
"""

import asyncio
import os
import sys

from agents import Agent, Model, Runner
from agents.mcp import MCPServerStreamableHttp

INSTRUCTIONS = (
    "Compute with execute_code instead of guessing; pass session_id to go on where you were, and end_session last."
)


def sandgate() -> MCPServerStreamableHttp:
    return MCPServerStreamableHttp(
        name="sandgate",
        params={
            "url": os.environ["SANDGATE_URL"] + "/mcp",
            "headers": {"Authorization": f"Bearer {os.environ['SANDGATE_API_KEY']}"},
            "timeout": 60,
        },
        client_session_timeout_seconds=60,  # Sandgate answers within 45 s; the usual 5 s are short for code
        cache_tools_list=True,
    )


async def ask(model: str | Model, question: str) -> str:
    """What the agent answers; whatever it ran is on record in Sandgate."""
    async with sandgate() as server:
        agent = Agent(name="analyst", instructions=INSTRUCTIONS, model=model, mcp_servers=[server])
        return (await Runner.run(agent, question)).final_output


if __name__ == "__main__":
    print(asyncio.run(ask(os.environ["MODEL"], sys.argv[1])))
