"""The node: one for each machine. Makes, meters and ends sandboxes for whoever may open its socket.

    python -I …/local/node --run-dir DIR --template default=/path/to/bin/python [--die-with-parent]

It listens on DIR/node.sock; requests and replies are lines of JSON. Its end, however it comes, is the end of every
sandbox. A node that starts adopts nothing: it removes what an earlier one left.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import stat
import struct
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guest import landlock, linux, seccomp
from node import cgroups, ground
from node.cgroups import Tree
from node.cores import Cores
from node.egress import Egress
from node.ground import Ground
from node.runs import Run
from node.sandboxes import Refusal, Sandbox
from node.templates import Content, Template
from node.uids import Block
from node.watchdog import LOOK_SECONDS
from node.zygotes import Zygote

from executions import network

DISK_SECONDS = 1
ISOLATION = ("none", "reduced", "namespaces", "microvm")  # as in the product's states
METER_SECONDS = (0.01, 1.0)  # between two looks at a meter that must not pass a limit
REMEMBERED = 1000  # sandboxes whose end had a reason that somebody may ask for
READY_SECONDS = 30  # how long create() waits for a zygote that warms up
WHY = {
    "": "There is no such sandbox.",
    "disk_full": "The sandbox wrote more than its disk_mib and was ended: the reduced mode has no smaller limit.",
    "out_of_memory": "The sandbox used up its memory, files in /home/user and /tmp included, and was ended.",
}
LAYER = re.compile(r"[0-9a-f]{64}|")
IDENTIFIER = re.compile(r"[a-z0-9]{1,64}")
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
LIMITS = {
    "memory_mib": (64, 1 << 20), "cpu_count": (1, 1024), "disk_mib": (1, 1 << 20), "processes": (4, 1 << 16),
    "output_bytes": (1, 1 << 40),
}  # fmt: skip


@dataclass(slots=True)
class Client:
    """Who is connected, with the runs that are metered for it."""

    reader: asyncio.StreamReader
    runs: list[Run] = field(default_factory=list)


class Node:
    def __init__(self, run_dir: Path, templates: dict[str, str], forks_limit: int) -> None:
        self.run_dir, self.forks_limit = run_dir, forks_limit
        self.root = linux.has_capabilities(linux.CAP_SYS_ADMIN)
        self.isolation, self.refused = "namespaces", ""  # what this machine allows, and why not more
        self.proved = False
        self.below: Ground | None = None
        self.block = Block() if self.root else None
        self.tree, self.without_cgroups = self._tree()
        self.templates: dict[str, Template] = {}
        self._lives: dict[str, asyncio.Task[None]] = {}  # of the templates
        self._first = {name: Content(python=python) for name, python in templates.items()}
        self.sandboxes: dict[str, Sandbox] = {}
        self.cores = Cores()
        self.proxy = Egress(self.block)
        self.reasons: dict[str, str] = {}  # why sandboxes have ended that nobody asked to end
        self.draining = False
        self._tasks: set[asyncio.Task[None]] = set()

    def _tree(self) -> tuple[Tree | None, str]:
        instead = "rlimits, a watchdog and a fixed choice of processors hold instead."
        mounts = "/sys/fs/cgroup" if self.root else cgroups.delegated()
        if not mounts:
            return None, f"Control groups need root, or a group that this user may divide: {instead}"
        name = hashlib.sha256(str(self.run_dir).encode()).hexdigest()[:12]
        try:
            return Tree(name, mounts), ""
        except OSError as problem:
            return None, f"Control groups cannot be used ({problem}): {instead}"

    # requests

    async def create(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.draining:
            raise Refusal("unavailable", "The node is shutting down.")
        identifier = request.get("sandbox_id")
        if not isinstance(identifier, str) or not IDENTIFIER.fullmatch(identifier):
            raise Refusal("invalid", "sandbox_id must be lowercase letters and digits.")
        if identifier in self.sandboxes:
            raise Refusal("exists", f"There is a sandbox {identifier}.")
        for name, (least, most) in LIMITS.items():
            value = request.get("limits", {}).get(name)
            if not isinstance(value, int) or not least <= value <= most:
                raise Refusal("invalid", f"limits.{name} must be between {least} and {most}.")
        template, zygote = await self._ready(request.get("template"))
        if ISOLATION.index(self.isolation) < ISOLATION.index(request.get("floor", "none")):
            raise Refusal("refused", f"Sandboxes have the isolation {self.isolation!r} here, below what was asked for.")
        if self.below is not None and request.get("network_allow"):
            raise Refusal("refused", "The reduced mode has no network.")
        layer = request.get("layer", "")
        if not LAYER.fullmatch(layer) or not (self.run_dir / "layers" / layer).is_dir():
            raise Refusal("refused", "There is no such folder of packages.")
        try:
            network.Rules(request.get("network_allow", []))
        except ValueError as problem:
            raise Refusal("invalid", str(problem)) from None
        cores = self.cores.take(request["limits"]["cpu_count"]) if self.tree is None else []
        sandbox = self.sandboxes[identifier] = Sandbox(request, self.run_dir / "sandboxes" / identifier, cores)
        sandbox.files, sandbox.start_command = template.content.files, template.content.start_command
        try:
            await sandbox.be_born(await zygote.unborn(), self.proxy, self.below)
        except OSError as problem:
            await self._end(sandbox)
            raise Refusal("unavailable", f"The sandbox could not be made: {problem}") from None
        except BaseException:
            await self._end(sandbox)
            raise
        sandbox.expire_in(float(request["timeout_seconds"]), lambda: self._end_soon(sandbox))
        self._background(self._bury(sandbox))
        return sandbox.described() | {"boot_ms": sandbox.boot_ms}

    async def _ready(self, name: Any) -> tuple[Template, Zygote]:
        template = self.templates.get(name)
        if template is None:
            known = ", ".join(self.templates) or "none"
            raise Refusal("refused", f"This node has no template {name!r}; it has: {known}.")
        try:
            return template, await asyncio.wait_for(template.ready(), READY_SECONDS)
        except TimeoutError:
            raise Refusal("refused", f"Template {name} is still warming up; try again in a minute.") from None
        except OSError as problem:
            raise Refusal("refused", f"Template {name} is {template.state}: {problem}") from None

    async def template(self, request: dict[str, Any]) -> dict[str, Any]:
        """Have a template as the request says, from now on; without python and absent it is let go."""
        name = request["name"]
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise Refusal("invalid", "name must be letters, digits, - and _.")
        if "python" in request or "absent" in request:
            self._have(name, Content.of(request))
        elif name in self.templates:
            del self.templates[name]
            self._background(self._let_go(self._lives.pop(name)))
        return {}

    def _have(self, name: str, content: Content) -> None:
        if name in self.templates:
            self.templates[name].renew(content)
            return
        template = self.templates[name] = Template(
            name, content, self.run_dir, self.block, self.tree, self.forks_limit, self.below
        )
        self._lives[name] = asyncio.create_task(template.run())

    async def _let_go(self, life: asyncio.Task[None]) -> None:
        life.cancel()
        await asyncio.gather(life, return_exceptions=True)

    async def _bury(self, sandbox: Sandbox) -> None:
        await sandbox.death()
        asked = sandbox.ending.locked() or self.sandboxes.get(sandbox.id) is not sandbox
        if not asked and sandbox.died_for_memory():
            self.reasons[sandbox.id] = "out_of_memory"
            if len(self.reasons) > REMEMBERED:
                del self.reasons[next(iter(self.reasons))]
        await self._end(sandbox)

    def _end_soon(self, sandbox: Sandbox) -> None:
        self._background(self._end(sandbox))

    def _background(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _end(self, sandbox: Sandbox) -> None:
        async with sandbox.ending:
            if sandbox.network_allow:
                await self.proxy.close(sandbox.id)
            await sandbox.end(self.block)
        if self.sandboxes.get(sandbox.id) == sandbox:
            del self.sandboxes[sandbox.id]
            self.cores.give_back(sandbox.cores)

    def _known(self, request: dict[str, Any]) -> Sandbox:
        sandbox = self.sandboxes.get(request.get("sandbox_id", ""))
        if sandbox is None or not sandbox.alive:
            reason = self.reasons.get(request.get("sandbox_id", ""), "")
            raise Refusal("lost", WHY[reason], reason)
        return sandbox

    async def kill(self, request: dict[str, Any]) -> dict[str, Any]:
        sandbox = self.sandboxes.get(request.get("sandbox_id", ""))
        if sandbox is not None:
            await self._end(sandbox)
        return {"was_there": sandbox is not None}

    async def list(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"sandboxes": [sandbox.described() for sandbox in self.sandboxes.values()]}

    async def set_timeout(self, request: dict[str, Any]) -> dict[str, Any]:
        sandbox = self._known(request)
        sandbox.expire_in(float(request["seconds"]), lambda: self._end_soon(sandbox))
        return {}

    async def pause(self, request: dict[str, Any]) -> dict[str, Any]:
        """It uses no CPU until it is resumed; its memory stays, and its time runs on."""
        await self._known(request).freeze()
        return {}

    async def resume(self, request: dict[str, Any]) -> dict[str, Any]:
        sandbox = self._known(request)
        await sandbox.thaw()
        return await self.set_timeout(request)

    async def begin(self, request: dict[str, Any]) -> dict[str, Any]:
        """Meter a run from now on, until the client has asked what it used, or hangs up."""
        sandbox = self._known(request)
        request["client"].runs.append(sandbox.begin_run())
        return {}

    async def used(self, request: dict[str, Any]) -> dict[str, Any]:
        sandbox, run = self._known(request), request["client"].runs[-1]
        used = run.used()
        request["client"].runs.remove(run)
        sandbox.end_run(run)
        return used

    async def why(self, request: dict[str, Any]) -> dict[str, Any]:
        self._known(request)
        return request["client"].runs[-1].why()

    async def spent(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answers when the sandbox has used `cpu_us` more than now."""
        limit = self._known(request).counters().cpu_us + request["cpu_us"]
        least, most = METER_SECONDS
        while (left := limit - self._known(request).counters().cpu_us) > 0:
            if request["client"].reader.at_eof():
                break
            await asyncio.sleep(min(most, max(least, left / 1_000_000 / (os.cpu_count() or 1))))
        return {}

    async def fate(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answers while the sandbox lives; when it is just dying, the refusal says why."""
        for _ in range(50):
            self._known(request)
            await asyncio.sleep(0.01)
        return {}

    async def egress(self, request: dict[str, Any]) -> dict[str, Any]:
        """A page of what the sandbox asked of the network; for a while also of one that has ended."""
        return await self.proxy.take(str(request["sandbox_id"]), int(request["after"]), bool(request["final"]))

    async def check(self, request: dict[str, Any]) -> dict[str, Any]:
        templates = {name: template.described() for name, template in self.templates.items()}
        return {
            "templates": templates,
            "walls": self.walls(),
            "sandboxes": len(self.sandboxes),
            "isolation": self.isolation,
        }

    def walls(self) -> dict[str, Any]:
        """Each wall: True, or the sentence that says what is missing. A sandbox is not made where one of the others fails."""
        abi = landlock.abi()
        known = linux.MACHINE in seccomp.ARCHITECTURES
        return {
            "namespaces": self.refused or self.proved or self._why_no_namespaces(),
            "uid": True
            if self.block is not None
            else "Sandboxes have the node's own uid on the host. Start the node as root.",
            "capabilities": True,
            "cgroups": self.tree is not None or self.without_cgroups,
            "seccomp": known or f"There is no system call table for {linux.MACHINE}.",
            "landlock": abi >= 6 or f"The kernel has Landlock ABI {abi}; signals are scoped from 6 (Linux 6.12).",
            "readonly_root": self.below is None or "No root of its own: Landlock keeps the machine's files.",
        }

    def _why_no_namespaces(self) -> str | bool:
        if any(template.zygote is not None for template in self.templates.values()):
            return True
        said = [t.detail for t in self.templates.values() if t.detail]
        return said[0] if said else "Not tried yet: the templates are warming up."

    OPERATIONS = ("create", "kill", "list", "set_timeout", "begin", "used", "why", "spent", "fate", "check", "template",
                  "egress", "pause", "resume")  # fmt: skip

    async def _answer(self, line: bytes, client: Client) -> dict[str, Any]:
        try:
            request = json.loads(line)
            request["client"] = client
            if request.get("op") not in self.OPERATIONS:
                raise Refusal("invalid", "Unknown operation.")
            return {"ok": True, **await getattr(self, request["op"])(request)}
        except Refusal as refusal:
            return {"error": refusal.code, "detail": refusal.detail, "reason": refusal.reason}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as problem:
            return {"error": "invalid", "detail": repr(problem)}
        except OSError as problem:
            return {"error": "internal", "detail": str(problem)}

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        credentials = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        client = Client(reader)
        try:
            if struct.unpack("iII", credentials)[1] in (0, os.getuid()):
                while line := await reader.readline():
                    writer.write(json.dumps(await self._answer(line, client)).encode() + b"\n")
                    await writer.drain()
        except (ConnectionError, ValueError, asyncio.CancelledError):
            pass
        finally:
            for run in client.runs:
                run.sandbox.end_run(run)
            writer.close()

    # life

    async def watch(self) -> None:
        """Where nobody else limits memory."""
        while self.tree is None:
            least, most = LOOK_SECONDS
            now = time.monotonic()
            watched = [(one, one.watchdog) for one in self.sandboxes.values()
                       if one.alive and one.watchdog is not None and one.freezer is None]  # fmt: skip
            for sandbox, watchdog in [one for one in watched if one[1].look_at <= now]:
                try:
                    if not watchdog.look():
                        self.reasons[sandbox.id] = "out_of_memory"
                        self._end_soon(sandbox)
                except Exception:  # one that ends while it is looked at must not leave the others unwatched
                    sys.stderr.write(traceback.format_exc())
            next_look = min((watchdog.look_at for _, watchdog in watched), default=now + most)
            await asyncio.sleep(max(least, min(most, next_look - time.monotonic())))

    async def _try(self) -> None:
        """Make one empty sandbox, to know whether this machine allows it; if not, go on with what it allows."""
        trial = Zygote(sys.executable, self.run_dir, self.block, self.tree, entry="probe")
        try:
            await trial.start()
            self.proved = True
        except ValueError:
            return  # this interpreter cannot be shown; the templates' own may
        except OSError as problem:
            self.refused = f"{problem}. manage.py doctor says what to type."
            own_uid = linux.has_capabilities(linux.CAP_CHOWN)
            if why := ground.impossible(own_uid):
                self.refused += f" Nor is there the reduced mode: {why}"
                return
            self.isolation = "reduced"
            self.block = (self.block or Block()) if own_uid else None
            self.below = Ground(self.run_dir, self.block)
        finally:
            await trial.stop()
        (self.run_dir / "isolation").write_text(self.isolation)

    async def watch_disks(self) -> None:
        """In the reduced mode nothing else limits what a sandbox writes."""
        while self.below is not None:
            await asyncio.sleep(DISK_SECONDS)
            for sandbox in [one for one in self.sandboxes.values() if one.alive]:
                if await asyncio.to_thread(self.below.is_over, sandbox.id, sandbox.limits["disk_mib"]):
                    self.reasons[sandbox.id] = "disk_full"
                    self._end_soon(sandbox)

    async def serve(self, ended: asyncio.Event) -> None:
        await self._clear()
        await self._try()
        folder = os.open(self.run_dir, os.O_PATH | os.O_DIRECTORY)
        listener = socket.socket(socket.AF_UNIX)
        os.umask(0o077)
        listener.bind(f"/proc/self/fd/{folder}/node.sock")
        os.chmod("node.sock", 0o600, dir_fd=folder)
        server = await asyncio.start_unix_server(self.connected, sock=listener, limit=1 << 20)
        for name, content in self._first.items():
            self._have(name, content)
        watching = asyncio.gather(self.watch(), self.watch_disks())
        await ended.wait()
        self.draining = True
        server.close()
        await asyncio.gather(*(self._end(sandbox) for sandbox in list(self.sandboxes.values())), return_exceptions=True)
        lives: list[asyncio.Future[Any]] = [watching, *self._lives.values()]
        for life in lives:
            life.cancel()
        await asyncio.gather(*lives, return_exceptions=True)
        await self.proxy.stop()
        if self.below is not None:
            self.below.remove()
        if self.tree is not None:
            self.tree.remove()
        (self.run_dir / "node.sock").unlink(missing_ok=True)

    async def _clear(self) -> None:
        """Make the run folder ours and empty; processes of an earlier node died with it."""
        (self.run_dir / "root").mkdir(exist_ok=True)
        (self.run_dir / "node.sock").unlink(missing_ok=True)
        (self.run_dir / "isolation").unlink(missing_ok=True)
        (self.run_dir / "layers").mkdir(exist_ok=True)
        os.chmod(self.run_dir / "layers", 0o711)  # sandboxes come through to their own, and cannot list them
        ground.clear(self.run_dir)
        for name in ("sandboxes", "languages"):
            shutil.rmtree(self.run_dir / name, ignore_errors=True)
            (self.run_dir / name).mkdir(mode=0o700)


async def _look(node: Node) -> None:
    """Try the walls, say what was found as JSON, and leave nothing."""
    await node._clear()
    await node._try()
    sys.stdout.write(json.dumps({"isolation": node.isolation, "walls": node.walls()}))
    if node.below is not None:
        node.below.remove()
    if node.tree is not None:
        node.tree.remove()


async def _run(node: Node, die_with_parent: bool) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    if die_with_parent:
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == 1:
            ended.set()  # it was too late
        if stat.S_ISFIFO(os.fstat(0).st_mode):  # for parents whose threads come and go: the pipe closes with the parent
            loop.add_reader(0, lambda: os.read(0, 4096) or (loop.remove_reader(0), ended.set()))
    await node.serve(ended)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="sandgate-node", description="Supervise the sandboxes of this machine.")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--template", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--forks-limit", type=int, default=10_000, help="sandboxes of one zygote; then it is renewed")
    parser.add_argument("--look", action="store_true", help="try the walls, print what was found as JSON, and end")
    parser.add_argument("--die-with-parent", action="store_true", help="end when the parent ends")
    options = parser.parse_args(arguments)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    run_dir = options.run_dir.absolute()
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chmod(run_dir, 0o700)
    lock = os.open(run_dir / "node.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)  # held until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.stderr.write(f"Another node serves {run_dir}.\n")
        return 1
    templates = dict(item.split("=", 1) for item in options.template)
    if options.look:
        asyncio.run(_look(Node(run_dir, {}, options.forks_limit)))
        return 0
    asyncio.run(_run(Node(run_dir, templates, options.forks_limit), options.die_with_parent))
    return 0
