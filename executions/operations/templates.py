"""Template rows and the machines that make them: what a row says is built outside the sandbox, then the node is told."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db.models import F

from executions import backends, packages, routes
from executions.backends.base import Check, TemplateState
from executions.backends.local import environment
from executions.errors import BackendError, Invalid
from executions.hop import rows
from executions.models import Template
from executions.operations.environment import check
from executions.serializers import template_shape

log = logging.getLogger(__name__)
UNDER = settings.DATA / "templates"
FILES_BYTES = 64 * 1024  # of all files of a template, as JSON: they travel to each sandbox with its plan
_building: dict[Path, asyncio.Task[None]] = {}


def mistakes(template: Template) -> dict[str, str]:
    """What cannot be in a template: {field: sentence}; empty where all is well."""
    found = {}
    try:
        for requirement in template.packages:
            packages.name_of(requirement)
    except (Invalid, TypeError, AttributeError) as e:
        found["packages"] = e.detail if isinstance(e, Invalid) else "A list of requirements."
    files = template.files
    if not isinstance(files, dict) or not all(isinstance(text, str) for text in files.values()):
        found["files"] = "An object: path to text."
    elif len(json.dumps(files)) > FILES_BYTES:
        found["files"] = (
            f"At most {FILES_BYTES >> 10} KiB in all: put what is larger into a package, or fetch it later."
        )
    elif bad := [name for name in files if ".." in name.split("/") or "\0" in name or not name.strip("/")]:
        found["files"] = f"{bad[0]!r} is no path of a file; relative ones begin at /home/user."
    return found


async def sync() -> None:
    """Have every backend that makes templates from their rows hold exactly the active ones; what is missing is built."""
    makers = [alias for alias in backends.aliases() if backends.get(alias).capabilities.templates]
    if not makers:
        return
    wanted = await rows(lambda: list(Template.objects.filter(is_active=True)))
    for alias in makers:
        known = await check(alias)
        if not known.walls:
            continue  # no node answers there: a later round finds it
        backend = backends.get(alias)
        try:
            for template in wanted:
                await _have(backend, template, known.templates.get(template.name))
            for name in known.templates.keys() - {template.name for template in wanted}:
                await backend.have_template(name, None)
        except BackendError as e:
            log.warning("templates_not_synced", extra={"backend": alias, "detail": e.detail})
    used = {interpreter_of(template) for template in wanted} | {environment.python_of(UNDER)}
    await asyncio.to_thread(environment.sweep, UNDER, used)


async def _have(backend: Any, template: Template, known: TemplateState | None) -> None:
    content = {
        "files": template.files,
        "start_command": template.start_command,
        "warm": template.warm,
        "build": template.build,
        **_interpreter(template),
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    serves_another = known is not None and known.state not in ("building", "broken", "missing")
    if (known and known.digest == digest) or (content.get("absent") == "building" and serves_another):
        return  # what is there serves until its successor is built
    await backend.have_template(template.name, {**content, "digest": digest})


def interpreter_of(template: Template) -> Path:
    """Where its Python lies, made or not."""
    if settings.TEMPLATE_PYTHON and not template.packages:
        return Path(settings.TEMPLATE_PYTHON)
    return environment.python_of(UNDER, packages=template.packages, build=template.build)


def _interpreter(template: Template) -> dict[str, str]:
    """The interpreter of a template, or why it has none; building is begun here."""
    if found := mistakes(template):
        return {"absent": "broken", "detail": " ".join(f"{field}: {why}" for field, why in found.items())}
    python = interpreter_of(template)
    if settings.TEMPLATE_PYTHON and not template.packages:
        return {"python": str(python)}
    if environment.is_made(UNDER, packages=template.packages, build=template.build):
        return {"python": str(python)}
    if why := environment.failed(UNDER, template.packages, template.build):
        return {"absent": "broken", "detail": why}
    if python not in _building:
        task = _building[python] = asyncio.create_task(_build(list(template.packages), template.build))
        task.add_done_callback(lambda done: _building.pop(python, None))
    return {"absent": "building", "detail": "its packages are being installed"}


async def _build(wanted: list[str], build: int) -> None:
    """Make one environment in a process of its own, which ends with this task; how it went is written in the folder."""
    arguments = [str(UNDER), str(build), *wanted]
    UNDER.mkdir(parents=True, exist_ok=True)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "executions.backends.local.environment", *arguments,
        cwd=settings.BASE_DIR, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        _, said = await process.communicate()
        log.info(
            "template_built", extra={"packages": wanted, "exit_code": process.returncode, "said": said.decode()[-500:]}
        )
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def stop_building() -> None:
    """End the builds of this process: their folders are begun again by whoever comes next."""
    tasks = list(_building.values())
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def rebuild(template: Template) -> None:
    """Have it built anew: from the packages' newest versions that fit, and with a fresh zygote."""
    Template.objects.filter(pk=template.pk).update(build=F("build") + 1)


async def template_states(templates: list[Template] | None = None) -> list[dict[str, Any]]:
    """Each active template (or these), with its state at every backend; all backends are asked at once."""
    if templates is None:
        templates = await rows(lambda: list(Template.objects.filter(is_active=True).order_by("name")))
    aliases = backends.aliases()
    found = dict(zip(aliases, await asyncio.gather(*map(check, aliases)), strict=True))
    told = []
    for template in templates:
        states = {alias: _state(template, alias, told_by) for alias, told_by in found.items()}
        best = next((s for s in states.values() if s.state in ("ready", "asleep")), next(iter(states.values())))
        told.append(
            {
                **template_shape(template).model_dump(mode="json"),
                "state": best.state,
                "detail": best.detail,
                "backends": {alias: {"state": s.state, "detail": s.detail} for alias, s in states.items()},
            }
        )
    return told


def _state(template: Template, alias: str, said: Check) -> TemplateState:
    backend = backends.get(alias)
    if backend.capabilities.templates:
        if not said.walls:
            return TemplateState("missing", said.detail)
        return said.templates.get(template.name) or TemplateState("building", "the node has not heard of it yet")
    if why := routes.lacking(template, backend):
        return TemplateState("missing", why)
    return TemplateState("ready" if said.ok else "missing", said.detail)
