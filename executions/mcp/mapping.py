"""The YAML in which an agent's tools are configured: which it has, their texts, and the limits of their arguments (docs/mcp.md)."""

from __future__ import annotations

import json
import re
import string
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from executions.errors import Invalid
from executions.mcp.tools import TOOLS, WORDS, Tool, over_maximum

MOST_BYTES = 64 * 1024
MOST_DEEP = 12  # levels; what is meant here has six
MOST_TOLD = 100  # mistakes
UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
OF_A_TOOL = {"title": str, "description": str, "arguments": dict}
OF_AN_ARGUMENT = {"description": str, "default": object, "maximum": int, "hidden": bool}
KINDS = {str: "a text", int: "a whole number from 1", bool: "true or false", dict: "a mapping"}


class Mistakes(Invalid):
    """The tool mapping cannot be taken; `lines` has every mistake as (line, sentence)."""

    def __init__(self, lines: list[tuple[int, str]]) -> None:
        self.lines = sorted(lines)
        said = "\n".join(f"line {line}: {sentence}" for line, sentence in self.lines[:MOST_TOLD])
        if more := len(self.lines[MOST_TOLD:]):
            said += f"\nand {more} more"
        super().__init__(said, field="tools", remedy="Correct these lines and send it again; nothing was changed.")


def parse(text: str) -> list[str] | dict[str, Any]:
    """What `Agent.tools` stores for such a text. Raises Mistakes, with all of them."""
    if len(text.encode(errors="replace")) > MOST_BYTES:
        raise Mistakes([(1, f"The mapping is larger than {MOST_BYTES // 1024} KiB.")])
    reading = _Reading()
    found = reading.whole(_composed(text))
    if reading.mistakes:
        raise Mistakes(reading.mistakes)
    return found


def render(tools: list[str] | dict[str, Any]) -> str:
    """The text that `parse` reads as this; nothing for an agent that has every tool as it is."""
    if isinstance(tools, list):
        return ", ".join(map(str, tools))
    return yaml.safe_dump({"tools": tools}, sort_keys=False, allow_unicode=True, width=110)


def _composed(text: str) -> Node | None:
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):  # one by one: nothing is built of it yet
            line = event.start_mark.line + 1 if event.start_mark else 1
            if isinstance(event, yaml.AliasEvent):
                raise Mistakes([(line, "Anchors and aliases are not read here: write it out.")])
            if isinstance(event, yaml.ScalarEvent) and UNSTORABLE.search(event.value):
                raise Mistakes([(line, "A NUL or half of a surrogate pair cannot be part of it.")])
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > MOST_DEEP:
                raise Mistakes([(line, f"It is nested more than {MOST_DEEP} deep.")])
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        raise Mistakes([(mark.line + 1 if mark else 1, f"This is not YAML: {e.problem or e.context}.")]) from None
    except yaml.YAMLError as e:
        raise Mistakes([(1, f"This is not YAML: {' '.join(str(e).split())}.")]) from None


class _Reading:
    """One pass over the nodes, which collects mistakes instead of stopping at the first."""

    def __init__(self) -> None:
        self.mistakes: list[tuple[int, str]] = []

    def wrong(self, node: Node, sentence: str) -> None:
        self.mistakes.append((node.start_mark.line + 1, sentence))

    def whole(self, root: Node | None) -> list[str] | dict[str, Any]:
        if isinstance(root, MappingNode) and [key.value for key, _ in root.value] == ["tools"]:
            root = root.value[0][1]
        match root:
            case None:
                return []
            case ScalarNode():
                return self.names([(root, name) for name in root.value.replace(",", " ").split()])
            case SequenceNode():
                return self.names([(node, str(node.value)) for node in root.value])
        known = dict.fromkeys(TOOLS)
        return {name: self.tool(name, node) for name, node in self.pairs(root, known, "a tool").items()}

    def names(self, found: list[tuple[Node, str]]) -> list[str]:
        for node, name in found:
            if name not in TOOLS:
                self.wrong(node, f"There is no tool {name[:60]!r}; there are {', '.join(TOOLS)}.")
        return list(dict.fromkeys(name for _, name in found))

    def pairs(self, node: Node, known: dict[str, Any], what: str) -> dict[str, Node]:
        """The entries of a mapping whose names are known and stand once; an entry that is left empty counts as an empty mapping."""
        if not isinstance(node, MappingNode):
            if not (isinstance(node, ScalarNode) and node.tag == "tag:yaml.org,2002:null"):
                self.wrong(node, f"Here belongs a mapping, whose names are each {what}.")
            return {}
        found: dict[str, Node] = {}
        for key, value in node.value:
            name = str(key.value)
            if name not in known:
                self.wrong(key, f"{name[:60]!r} is not {what}; there are {', '.join(known)}.")
            elif name in found:
                self.wrong(key, f"{name!r} stands twice.")
            else:
                found[name] = value
        return found

    def tool(self, name: str, node: Node) -> dict[str, Any]:
        tool = TOOLS[name]
        found: dict[str, Any] = {}
        for key, value in self.pairs(node, OF_A_TOOL, "something that a tool has").items():
            if key == "arguments":
                fields = tool.arguments.model_fields
                pairs = self.pairs(value, fields, f"an argument of {name}")
                found[key] = {argument: self.argument(tool, argument, said) for argument, said in pairs.items()}
            else:
                found[key] = self.value(value, str)
                if key == "description" and found[key]:
                    self.words(value, found[key])
        return found

    def words(self, node: Node, text: str) -> None:
        try:
            asked = [(name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(text)]
        except ValueError:
            return self.wrong(node, "A description writes a brace as {{ or }}.")
        for name, spec, conversion in asked:
            if name is not None and (name not in WORDS or spec or conversion):
                self.wrong(node, f"A description may say {{{'}, {'.join(WORDS)}}}, and not {{{name[:40]}}}.")

    def argument(self, tool: Tool, name: str, node: Node) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in self.pairs(node, OF_AN_ARGUMENT, "something that an argument has").items():
            found[key] = self.default(tool, name, value) if key == "default" else self.value(value, OF_AN_ARGUMENT[key])
        field = tool.arguments.model_fields[name]
        if found.get("hidden") and field.is_required() and "default" not in found:
            self.wrong(node, f"{name} must be given: hide it only with a default.")
        if over := over_maximum(found.get("default"), found.get("maximum")):
            self.wrong(node, f"The default of {name} is {over}.")
        return found

    def value(self, node: Node, kind: Any) -> Any:
        said = self.constructed(node)
        if type(said) is not kind or (kind is int and not 1 <= said < 2**53):
            self.wrong(node, f"Here belongs {KINDS[kind]}.")
            return None
        return said

    def default(self, tool: Tool, name: str, node: Node) -> Any:
        field = tool.arguments.model_fields[name]
        kind = TypeAdapter(field.rebuild_annotation())
        try:
            return kind.dump_python(kind.validate_python(self.constructed(node)), mode="json")
        except ValidationError as e:
            self.wrong(node, f"This cannot be {name}: {e.errors()[0]['msg']}.")

    def constructed(self, node: Node) -> Any:
        try:
            said = yaml.constructor.SafeConstructor().construct_object(node, deep=True)
            json.dumps(said, allow_nan=False, default=str)  # no infinity, nor more digits than can be told
            return said
        except (yaml.YAMLError, ValueError, OverflowError, TypeError):
            self.wrong(node, "This value cannot be read.")
