"""The MCP tools of one agent as YAML: print them, check a file, take it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from executions import audit
from executions.keys import Caller
from executions.mcp import mapping
from executions.mcp.tools import TOOLS
from executions.models import Agent


class Command(BaseCommand):
    help = "Print an agent's MCP tools as YAML, or take them from a file (- is standard input); docs/mcp.md has the schema."

    def add_arguments(self, parser: Any) -> None:
        parser.add_argument("agent", nargs="?", help="its name or id")
        parser.add_argument("file", nargs="?", help="the YAML to take; left out: print what the agent has")
        parser.add_argument("--team", help="where two teams have an agent of that name")
        parser.add_argument("--check", action="store_true", help="tell the file's mistakes, change nothing")
        parser.add_argument("--all", action="store_true", help="print every tool with its usual texts, to begin with")

    def handle(self, *, agent: str | None, file: str | None, team: str | None, check: bool, **options: Any) -> None:
        if options["all"]:
            whole = {name: {"title": tool.title, "description": tool.description} for name, tool in TOOLS.items()}
            self.stdout.write(mapping.render(whole).rstrip())
            return
        found = _find(agent, team)
        if file is None:
            self.stdout.write(mapping.render(found.tools).rstrip() or "# every tool, as it is: --all prints them")
            return
        try:
            tools = mapping.parse(sys.stdin.read() if file == "-" else Path(file).read_text())
        except mapping.Mistakes as e:
            raise CommandError("\n".join(f"{file}:{line}: {said}" for line, said in e.lines)) from None
        except (OSError, UnicodeDecodeError) as e:
            raise CommandError(f"{file} cannot be read: {e}") from None
        if check:
            self.stdout.write(f"{file}: no mistakes.")
            return
        before, found.tools = found.tools, tools
        found.save(update_fields=["tools"])
        audit.record(
            "agent_changed",
            caller=Caller(found.team, None),
            subject=found.pk,
            before={"tools": before},
            after={"tools": tools},
            reason="by the command line",
        )
        self.stdout.write(f"Agent {found.name} has {', '.join(tools) or 'every tool'}.")


def _find(agent: str | None, team: str | None) -> Agent:
    if not agent:
        raise CommandError("Name the agent: manage.py tools AGENT [FILE]")
    found = Agent.objects.filter(name=agent) | Agent.objects.filter(pk=agent)
    if team:
        found = found.filter(team__name=team)
    rows = list(found.select_related("team")[:2])
    if not rows:
        known = ", ".join(Agent.objects.order_by("name").values_list("name", flat=True)[:20])
        raise CommandError(f"There is no agent {agent!r}; there are {known or 'none'}.")
    if len(rows) > 1:
        raise CommandError(f"Two teams have an agent {agent!r}: name one with --team.")
    return rows[0]
