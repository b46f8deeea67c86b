"""What there is to resolve against: the Python of a sandbox or of a template, and the packages that it has."""

from __future__ import annotations

import json
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from executions import backends
from executions.errors import InstallFailed
from executions.models import Sandbox, Template

ASK = (
    'import json, platform, sys, importlib.metadata as m; there = [p for p in sys.path if not p.endswith("/.packages")]; '
    "print(json.dumps([list(sys.version_info[:2]), platform.machine(), {d.name: d.version for d in m.distributions(path=there)}]))"
)
KNOWN_SECONDS = 600
NAME, VERSION = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*"), re.compile(r"[A-Za-z0-9.!+_-]{1,100}")
SAID_CHARACTERS = 1_000_000


@dataclass(frozen=True, slots=True)
class Base:
    python: str  # "3.11"
    machine: str  # "x86_64"
    present: dict[str, str]  # name to version


_known: dict[tuple[Any, ...], tuple[float, Base]] = {}


async def of_sandbox(sandbox: Sandbox, handle: dict[str, Any] | None = None) -> Base:
    """What its template gave it; asked in one sandbox, believed of its siblings for some minutes. Raises InstallFailed."""
    template = sandbox.template
    key = (
        sandbox.team_id,
        sandbox.agent_id,
        sandbox.backend,
        template.pk,
        template.build,
        template.e2b_template,
        json.dumps(template.packages),
    )
    at, base = _known.get(key, (0.0, None))
    if base is not None and time.monotonic() - at < KNOWN_SECONDS:
        return base
    answer = await said(sandbox, f"python3 -I -c '{ASK}'", handle or sandbox.machine)
    try:
        (major, minor), machine, present = json.loads(answer.strip().splitlines()[-1])
        base = Base(
            f"{int(major)}.{int(minor)}", str(machine), {canonicalize_name(n): str(v) for n, v in present.items()}
        )
    except (ValueError, IndexError, TypeError, AttributeError) as e:
        raise InstallFailed("The sandbox has no Python that answers.") from e
    if not re.fullmatch(r"[a-z0-9_]{1,20}", base.machine) or not all(
        NAME.fullmatch(name) and VERSION.fullmatch(version) for name, version in base.present.items()
    ):  # a guest may have answered, and this becomes a file that uv reads
        raise InstallFailed("The sandbox has no Python that answers.")
    _known[key] = (time.monotonic(), base)
    return base


async def said(sandbox: Sandbox, command: str, handle: dict[str, Any]) -> str:
    """What a command in the sandbox has printed. Raises InstallFailed where it fails."""
    out, err = list[str](), list[str]()
    code, size = None, 0
    async for event in backends.get(sandbox.backend).run_command(handle, command, timeout_seconds=120):
        match event.kind:
            case "stdout":
                out.append(event.data["text"])
                if (size := size + len(out[-1])) > SAID_CHARACTERS:
                    raise InstallFailed("The sandbox prints without end, where it was asked for its packages.")
            case "stderr":
                err[:] = [("".join(err) + event.data["text"])[-1000:]]
            case "exit":
                code = event.data["exit_code"]
    if code:
        raise InstallFailed(f"The sandbox could not take the packages: {''.join(err)[-300:].strip() or code}")
    return "".join(out)


def of_template(template: Template) -> Base:
    """What sandboxes of this template have on this machine, read from its folders; nothing is run. Raises InstallFailed."""
    from executions.operations.templates import interpreter_of

    python = interpreter_of(template)
    for folder in sorted(Path(python).parent.parent.glob("lib/python3.*/site-packages")):
        found = re.fullmatch(r"python(3\.\d+)", folder.parent.name)
        if found:
            return Base(found[1], platform.machine(), dict(_distributions(folder)))
    raise InstallFailed(
        f"The packages of template {template.name} are not on this machine yet.",
        remedy="Try again when GET /api/v1/templates says that it is ready, or install into a session.",
    )


def _distributions(folder: Path):
    for info in folder.glob("*.dist-info"):
        name, _, version = info.name.removesuffix(".dist-info").rpartition("-")
        yield canonicalize_name(name), version
