"""A LangGraph agent whose code runs in Sandgate, by LangChain's MCP adapters.

SANDGATE_URL=… SANDGATE_API_KEY=… MODEL=openai:gpt-5-mini OPENAI_API_KEY=… python langgraph_mcp.py "What is 2 ** 100?"
"""

import asyncio
import os
import sys

from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel
from langchain_mcp_adapters.client import MultiServerMCPClient

INSTRUCTIONS = (
    "Compute with execute_code instead of guessing; pass session_id to go on where you were, and end_session last."
)


def sandgate() -> MultiServerMCPClient:
    return MultiServerMCPClient(
        {
            "sandgate": {
                "transport": "streamable_http",
                "url": os.environ["SANDGATE_URL"] + "/mcp",
                "headers": {"Authorization": f"Bearer {os.environ['SANDGATE_API_KEY']}"},
                "timeout": 60,  # Sandgate answers within 45 s
            }
        }
    )


async def ask(model: str | BaseChatModel, question: str) -> str:
    """What the agent answers; whatever it ran is on record in Sandgate."""
    agent = create_agent(model, await sandgate().get_tools(), system_prompt=INSTRUCTIONS)
    state = await agent.ainvoke({"messages": [("user", question)]})
    return state["messages"][-1].text


if __name__ == "__main__":
    print(asyncio.run(ask(os.environ["MODEL"], sys.argv[1])))
