"""What a tool says: text for the model first, images, and the shape that every door sends as structured content."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from executions import packages
from executions.errors import Invalid, PackageDenied, SandgateError
from executions.hop import rows
from executions.keys import Caller
from executions.mcp import resources
from executions.mcp.resources import Link
from executions.serializers import CodeError, ExecutionShape
from executions.states import EXECUTION_ENDED, ExecutionState

E = ExecutionState
TEXT_BYTES = 8 * 1024  # of output that the model reads; the rest is behind a link
TRACEBACK_CHARS = 2000
IMAGES = 8
IMAGE_TYPES = ("image/png", "image/jpeg")
READABLE = ("text/plain", "text/markdown", "text/latex", "application/json", "text/html", "image/svg+xml")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
MISSING_NAMES = ("ModuleNotFoundError", "ImportError")
MISSING = re.compile(r"No module named '([A-Za-z0-9_]+)")
DISTRIBUTIONS = {  # whose name is not the module's
    "bs4": "beautifulsoup4",
    "cv2": "opencv-python-headless",
    "dateutil": "python-dateutil",
    "docx": "python-docx",
    "fitz": "pymupdf",
    "PIL": "pillow",
    "pptx": "python-pptx",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "yaml": "pyyaml",
}


@dataclass
class Answer:
    """One tool result, before it is put into the SDK's types."""

    text: str
    structured: dict[str, Any]
    images: list[tuple[str, str]] = field(default_factory=list)  # (MIME type, base64)
    links: list[Link] = field(default_factory=list)
    is_error: bool = False


def of(shape: BaseModel, text: str) -> Answer:
    return Answer(text, shape.model_dump(mode="json"))


def refusal(error: SandgateError, request_id: str) -> Answer:
    """An error that the model reads: code, why, what to do, what is left; the same members as REST's problem."""
    said = error.sentence()
    facts = [f"{name}: {error.facts[name]}" for name in ("field", "retry_after") if error.facts.get(name) is not None]
    text = f"{said} [{' · '.join(facts)}]" if facts else said  # some models are shown nothing but the text
    return Answer(text, error.problem() | {"request_id": request_id}, is_error=True)


async def execution(shape: ExecutionShape, caller: Caller, *, waited: str = "") -> Answer:
    """One execution. The code's own failure is an error result: that is how a model learns that it has to change something."""
    link = f"/api/v1/executions/{shape.id}"
    images = [(kind, bundle[kind]) for bundle in shape.results for kind in IMAGE_TYPES if bundle.get(kind)]
    output = "\n".join(_output(shape))
    parts = [capped(output, link)]
    printed = len((shape.logs.stdout + shape.logs.stderr).encode(errors="replace"))
    links = [resources.of_output(shape.id, printed)] if len(output.encode(errors="replace")) > TEXT_BYTES else []
    if len(images) > IMAGES:
        parts.append(f"{len(images) - IMAGES} more images: GET {link}")
    hint = ""
    if shape.error is not None and shape.error.name in MISSING_NAMES:
        hint = await rows(install_hint, shape.error, caller)
    parts += _failure(shape, hint)
    if shape.fell_back and shape.backend:
        parts.append(f"[on {shape.backend}, as {shape.fell_back}]")
    parts.append(_whereabouts(shape, waited))
    structured = shape.model_dump(mode="json")
    structured["logs"] = {name: capped(text, link) for name, text in structured["logs"].items()}
    failed = shape.state in EXECUTION_ENDED and shape.state != E.SUCCEEDED
    return Answer("\n".join(p for p in parts if p), structured, images[:IMAGES], links, is_error=failed)


def _output(shape: ExecutionShape) -> Iterator[str]:
    if shape.logs.stdout:
        yield shape.logs.stdout.rstrip("\n")
    if shape.logs.stderr:
        yield f"stderr:\n{shape.logs.stderr.rstrip()}"
    for bundle, main in zip(shape.results, shape.mains, strict=False):
        kind = next((k for k in READABLE if bundle.get(k)), None)
        if kind:
            yield f"{'value' if main else 'shown'}: {bundle[kind]}"
    if shape.truncated:
        yield "[The output went over the limit; what came later was dropped.]"


def _failure(shape: ExecutionShape, hint: str) -> Iterator[str]:
    if shape.error:
        yield f"{shape.error.name}: {shape.error.value[:TRACEBACK_CHARS]}"
        traceback = ESCAPES.sub("", shape.error.traceback).strip()
        if traceback and traceback != f"{shape.error.name}: {shape.error.value}":
            yield traceback[-TRACEBACK_CHARS:]
        yield hint
        if not shape.error_code:
            yield shape.detail
    if shape.error_code:
        yield f"{shape.error_code}: {shape.detail} {_remedies().get(shape.error_code, '')}".strip()


def install_hint(error: CodeError, caller: Caller) -> str:
    """Whether install_package can mend a missing import, in the words of the agent's policy; empty for other errors."""
    found = MISSING.search(error.value) if error.name in MISSING_NAMES else None
    if found is None or caller.agent is None:
        return ""
    name = DISTRIBUTIONS.get(found[1], found[1].replace("_", "-"))
    try:
        outlook = packages.outlook(caller.agent, packages.name_of(name))
        if outlook.answer != "allow":
            return f"install_package can ask a person for {name}. {outlook.reason}"
        return f"install_package can add {name}: allowed by this agent's policy ({outlook.reason})."
    except PackageDenied as denied:
        return denied.sentence()
    except Invalid:
        return ""


def _remedies() -> dict[str, str]:
    found, waiting = {}, [SandgateError]
    while waiting:
        kind = waiting.pop()
        found[kind.code] = kind.remedy
        waiting += kind.__subclasses__()
    return found


def _whereabouts(shape: ExecutionShape, waited: str) -> str:
    """Ids also stand in the text: some clients show the model nothing else."""
    ids = f"execution_id: {shape.id}" + (f" · session_id: {shape.session_id}" if shape.session_id else "")
    if shape.state in EXECUTION_ENDED:
        seconds = f" in {shape.usage.run_seconds:.2f} s" if shape.usage.run_seconds is not None else ""
        return f"[{shape.state}{seconds} · {ids}]"
    if shape.queue is not None:
        place = f"number {shape.queue.position} in the queue" if shape.queue.position else "in the queue"
        waited = f"{waited}, {place}: {shape.queue.reason}"
    return (
        f"[{shape.state}{waited}; it goes on, do not send it again · {ids}]\n"
        f"get_execution(execution_id, after_seq={shape.last_seq}) waits for the rest; cancel_execution stops it."
    )


def capped(text: str, link: str) -> str:
    """Head and tail of a long text, with the link to all of it."""
    raw = text.encode(errors="replace")
    if len(raw) <= TEXT_BYTES:
        return text
    half = TEXT_BYTES // 2
    head, tail = raw[:half].decode(errors="ignore"), raw[-half:].decode(errors="ignore")
    return f"{head}\n[… {len(raw) - TEXT_BYTES:,} bytes left out: GET {link} has all of it …]\n{tail}"
