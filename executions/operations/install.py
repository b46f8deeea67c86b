"""Packages into a session: resolved and fetched outside the sandbox, wheels only, no package code on the host."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

from asgiref.sync import sync_to_async
from django.conf import settings
from django.db import transaction

from executions import backends, packages
from executions.backends.local.environment import uv_environ
from executions.errors import InstallFailed, PackageDenied
from executions.hop import rows
from executions.keys import Caller
from executions.models import Package, Sandbox
from executions.operations import pausing
from executions.operations.sessions import gone_is_recorded
from executions.operations.submit import claim_session, record_refusal
from executions.states import Scope, Verdict

TARGET = "$HOME/.packages"  # behind the template's own packages on sys.path: never in front of them
ASK = (
    "import json, sys, importlib.metadata as m; "
    "print(json.dumps([list(sys.version_info[:2]), {d.name: d.version for d in m.distributions()}]))"
)
ARCHIVE = "${TMPDIR:-/tmp}/.packages.tar"  # to the API always in /tmp
SEE = (
    "import sys, os.path, importlib\nsys.path += {os.path.expanduser('~/.packages')} - {*sys.path}\n"
    "importlib.invalidate_caches()\n"
)
UV_SECONDS = 300


async def install(*, caller: Caller, session_id: str, requirements: list[str]) -> list[Package]:
    """Make packages importable in a live session, without a restart. Raises PackageDenied, InstallFailed, SessionGone."""
    sandbox, reasons = await rows(_admit, caller, session_id, requirements)
    await pausing.awake(sandbox)
    backend = backends.get(sandbox.backend)
    with gone_is_recorded(sandbox):
        version, present = await _look(sandbox)
        with tempfile.TemporaryDirectory(prefix="install-", dir=_scratch()) as folder:
            fetched = await sync_to_async(_fetch, thread_sensitive=False)(Path(folder), requirements, version, present)
            if fetched:
                archive = Path(folder) / "packages.tar"
                await sync_to_async(_pack, thread_sensitive=False)(Path(folder) / "target", archive)
                await backend.write_file(sandbox.machine, "/tmp/.packages.tar", _pieces(archive))
                await _command(
                    sandbox,
                    f'mkdir -p "{TARGET}" && tar -xf "{ARCHIVE}" -C "{TARGET}"; s=$?; rm -f "{ARCHIVE}"; exit $s',
                )
                async for _ in backend.run_code(sandbox.machine, SEE, timeout_seconds=30):
                    pass
    return await rows(_record, caller, sandbox, reasons, fetched, present)


def _admit(caller: Caller, session_id: str, requirements: list[str]) -> tuple[Sandbox, dict[str, str]]:
    caller.needs(Scope.RUN)
    sandbox = claim_session(caller, session_id)
    reasons = {}
    for requirement in requirements:
        try:
            reasons[packages.name_of(requirement)] = packages.decide(sandbox.agent, requirement)
        except PackageDenied as denied:
            with transaction.atomic(durable=True):
                _row(caller, sandbox, packages.name_of(requirement), verdict=Verdict.DENIED, reason=denied.detail[:300])
                record_refusal(caller, denied)
            raise
    return sandbox, reasons


def _row(caller: Caller, sandbox: Sandbox, name: str, **fields) -> Package:
    return Package.objects.create(
        team=caller.team, agent=sandbox.agent, sandbox=sandbox, key=caller.key, actor=caller.person, name=name, **fields
    )


async def _look(sandbox: Sandbox) -> tuple[str, dict[str, str]]:
    """The Python of the sandbox ("3.11") and what is installed there (name to version)."""
    said = await _command(sandbox, f"PYTHONPATH=\"{TARGET}\" python3 -c '{ASK}'")
    try:
        (major, minor), present = json.loads(said.strip().splitlines()[-1])
    except (ValueError, IndexError) as e:
        raise InstallFailed("The sandbox has no Python that answers.") from e
    return f"{int(major)}.{int(minor)}", {str(k).lower().replace("_", "-"): str(v) for k, v in present.items()}


async def _command(sandbox: Sandbox, command: str) -> str:
    out, err, code = [], [], None
    async for event in backends.get(sandbox.backend).run_command(sandbox.machine, command, timeout_seconds=120):
        match event.kind:
            case "stdout":
                out.append(event.data["text"])
            case "stderr":
                err.append(event.data["text"])
            case "exit":
                code = event.data["exit_code"]
    if code:
        raise InstallFailed(f"The sandbox could not take the packages: {''.join(err)[-300:].strip() or code}")
    return "".join(out)


def _scratch() -> Path:
    folder = settings.DATA / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _uv() -> str:
    beside = Path(sysconfig.get_path("scripts")) / "uv"
    found = str(beside) if beside.exists() else shutil.which("uv")
    if not found:
        raise InstallFailed("uv is not installed beside this server.", remedy=f"{sys.executable} -m pip install uv")
    return found


def _fetch(folder: Path, requirements: list[str], version: str, present: dict[str, str]) -> list[dict]:
    """Resolve against what the sandbox has, and unpack what it lacks into folder/target: wheels only, nothing is run."""
    (folder / "asked.in").write_text("\n".join(requirements) + "\n")
    (folder / "present.txt").write_text("".join(f"{name}=={v}\n" for name, v in present.items() if "+" not in v))
    where = ["--python-version", version, "--python-platform", "linux", "--only-binary", ":all:", "--no-header", "-q"]
    _run(
        _uv(),
        "pip",
        "compile",
        str(folder / "asked.in"),
        "-c",
        str(folder / "present.txt"),
        *where,
        "--no-annotate",
        "-o",
        str(folder / "lock.txt"),
    )
    lines = [line.split(";")[0].strip() for line in (folder / "lock.txt").read_text().splitlines()]
    pins = [line for line in lines if "==" in line and present.get(line.split("==")[0]) != line.split("==")[1]]
    if not pins:
        return []
    (folder / "missing.txt").write_text("\n".join(pins) + "\n")
    target = folder / "target"
    _run(
        _uv(),
        "pip",
        "install",
        "-r",
        str(folder / "missing.txt"),
        "--no-deps",
        "--target",
        str(target),
        *[w for w in where if w != "--no-header"],
    )
    found = []
    for record in sorted(target.glob("*.dist-info/RECORD")):
        name, _, v = record.parent.name.removesuffix(".dist-info").rpartition("-")
        size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file()) if len(pins) == 1 else None
        digest = hashlib.sha256(record.read_bytes()).hexdigest()  # RECORD holds the hash of every file
        found.append({"name": name.lower().replace("_", "-"), "version": v, "sha256": digest, "size_bytes": size})
    return found


def _run(*argv: str) -> None:
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=UV_SECONDS, stdin=subprocess.DEVNULL, env=uv_environ()
        )
    except subprocess.TimeoutExpired as e:
        raise InstallFailed(f"The package index did not answer within {UV_SECONDS} s.") from e
    if done.returncode:
        said = " ".join(line.strip(" ×╰─▶│") for line in done.stderr.splitlines() if line.strip())
        raise InstallFailed(f"It cannot be installed: {said[:600]}")


def _pack(target: Path, archive: Path) -> None:
    with tarfile.open(archive, "w") as tar:
        for child in sorted(target.iterdir()):
            tar.add(child, arcname=child.name, filter=_plain)


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if not (info.isfile() or info.isdir()):
        return None  # a wheel has no reason to carry links or devices
    info.uid = info.gid = 1000
    info.uname = info.gname = "user"
    return info


async def _pieces(archive: Path):
    with archive.open("rb") as f:
        while piece := await asyncio.to_thread(f.read, 256 * 1024):
            yield piece


@transaction.atomic(durable=True)
def _record(
    caller: Caller, sandbox: Sandbox, reasons: dict[str, str], fetched: list[dict], present: dict[str, str]
) -> list[Package]:
    installed = [
        _row(
            caller,
            sandbox,
            verdict=Verdict.ALLOWED,
            requested=item["name"] in reasons,
            reason=reasons.get(item["name"], "needed by a package that was asked for"),
            **item,
        )
        for item in fetched
    ]
    there = {p.name for p in installed}
    installed += [
        _row(caller, sandbox, name, version=present.get(name, ""), verdict=Verdict.ALLOWED, reason="was there already")
        for name in reasons
        if name not in there
    ]
    return installed
