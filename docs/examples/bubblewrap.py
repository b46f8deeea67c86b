"""A runtime of one's own: Sandgate's agent as pid 1 of a bubblewrap, one for each sandbox.

Code, commands, contexts and files are inherited from the backend that speaks to the agent, over the two sockets of E2B's
data plane. What is left is to make the box, to end it, and to say what is there.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from executions.backends import local
from executions.backends.base import Capabilities, Check, Handle, Listed, SandboxSpec
from executions.backends.local.link import Meter
from executions.errors import BackendError, BackendUnavailable, SandboxLost

OURS = Path(local.__file__).parent
SHOWN = "/usr /bin /sbin /lib /lib32 /lib64 /etc/alternatives /etc/fonts /etc/ld.so.cache /etc/ssl".split()
BOX = "--unshare-all --as-pid-1 --uid 1000 --gid 1000 --cap-drop ALL --proc /proc --dev /dev --chdir /home/user".split()
ENV = {"HOME": "/home/user", "MPLCONFIGDIR": "/opt/fonts"}
QUIET = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
START = """import json, socket, sys
plan, sys.path[:0] = json.loads(sys.argv[1]), ["/opt/sandgate"]
from guest import agent, languages, python_context, seccomp, walls
walls.restrict(plan, set(plan["sockets"]), seccomp.program(counted=False))
python_context.PRELOADED = ["matplotlib"]  # the others when they are used: this is no zygote that forks what it has
python_context.warm(), languages.look()
agent.main(plan, socket.socket(fileno=plan["sockets"][0]), None, *plan["sockets"][1:])
"""


class Unmetered(Meter):
    """Nobody measures runs from outside: they have no limit of CPU time, and name no limit that they reached."""

    async def _ask(self, op: str) -> dict[str, Any]:
        if op == "used":
            raise SandboxLost
        return {"reached": [], "memory_kills": 0, "memory_mib": 0}


class BubblewrapBackend(local.LocalBackend):
    """OPTIONS: RUN_DIR, a folder with a short path; PYTHON, with the sandboxes' packages; BWRAP, where it is not on PATH."""

    capabilities = Capabilities(executes=True, commands=True, files=True, contexts=True, packages=True, ports=True)
    isolation = "reduced"  # namespaces and filters, but one user for all sandboxes, and no control groups
    refusal = ""

    def __init__(self, alias: str, options: dict[str, Any]) -> None:
        super().__init__(alias, options)
        self.started: list[subprocess.Popen] = []  # by this process, which reaps them
        self.shown: list[str] = []
        self.bwrap = options.get("BWRAP") or shutil.which("bwrap") or ""

    def _meter(self, handle: Handle) -> Meter:
        return Unmetered(self.run_dir, handle["sandbox_id"])

    async def create(self, spec: SandboxSpec) -> Handle:
        folder, token = Path(self.run_dir, spec.sandbox_id), secrets.token_hex(16)
        handle, sockets = {"sandbox_id": spec.sandbox_id, "dir": str(folder), "token": token}, list(socket.socketpair())
        try:
            folder.mkdir(parents=True, mode=0o700)
            for port in (49983, 49999):
                sockets.append(socket.create_server(f"{folder}/{port}.sock", family=socket.AF_UNIX, backlog=64))
            command = await asyncio.to_thread(self._command, spec, token, [s.fileno() for s in sockets[1:]])
            with open(folder / "info", "wb") as info:
                given = [info.fileno(), *(s.fileno() for s in sockets[1:])]
                command[1:1] = ["--info-fd", str(info.fileno())]
                self.started.append(subprocess.Popen(command, pass_fds=given, env=ENV, start_new_session=True, **QUIET))
            sockets[1].close()
            sockets[0].setblocking(False)
            said = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sockets[0], 4000), 60)
            if said != b"ready":
                raise OSError(said.decode(errors="replace") or "it ended at once")
            await self.set_timeout(handle, spec.timeout_seconds)
            return handle
        except BaseException as e:  # also when nobody waits for it any more
            await self.kill_by_id(spec.sandbox_id)
            if isinstance(e, Exception):
                raise BackendUnavailable(f"bubblewrap made no sandbox: {e}") from e
            raise
        finally:
            for one in sockets:
                one.close()

    def _command(self, spec: SandboxSpec, token: str, sockets: list[int]) -> list[str]:
        fonts = f"{self.run_dir}/.fonts"
        if not self.shown:  # once: where this Python lies, and matplotlib's list of fonts, which takes seconds to make
            argv = [self.options["PYTHON"], "-c", "import sys, matplotlib.pyplot; print(sys.prefix, sys.base_prefix)"]
            self.shown = subprocess.check_output(argv, env={"MPLCONFIGDIR": fonts}, text=True).split()
        plan = {
            "sandbox_id": spec.sandbox_id, "template": spec.template, "token": token, "env": spec.env, "sockets": sockets,
            "limits": asdict(spec.limits), "counted": False, "cores": [], "proxy_port": 0, "files": {}, "start_command": "",
        }  # fmt: skip
        size = ["--size", str(spec.limits.disk_mib << 20), "--tmpfs"]
        return [
            self.bwrap, *BOX, *size, "/dev/shm", *size, "/tmp", *size, "/home/user",
            *(word for path in SHOWN + self.shown for word in ("--ro-bind-try", path, path)), "--ro-bind", fonts, "/opt/fonts",
            "--ro-bind", f"{OURS}/guest", "/opt/sandgate/guest", "--ro-bind", f"{OURS.parent}/wire.py", "/opt/sandgate/wire.py",
            self.options["PYTHON"], "-c", START, json.dumps(plan),
        ]  # fmt: skip

    def _pid(self, sandbox_id: str) -> int:
        """Its pid 1, seen from here; 0 where it has ended. Another process that got its number is not taken for it."""
        try:
            pid = json.loads(Path(self.run_dir, sandbox_id, "info").read_text())["child-pid"]
            return pid if sandbox_id.encode() in Path(f"/proc/{pid}/cmdline").read_bytes() else 0
        except (OSError, ValueError):
            return 0

    async def set_timeout(self, handle: Handle, seconds: int) -> None:
        """This process ends it then; when it is gone itself by then, whoever lists next does."""
        await self.connect(handle)
        Path(handle["dir"], "ends").write_text(str(time.time() + seconds))
        asyncio.get_running_loop().call_later(seconds + 0.1, self._lives, handle["sandbox_id"])

    def _lives(self, sandbox_id: str) -> bool:
        """False where it has ended; one whose time is over is ended by this question."""
        ends, pid = Path(self.run_dir, sandbox_id, "ends"), self._pid(sandbox_id)
        if over := pid and ends.exists() and float(ends.read_text()) < time.time():
            os.kill(pid, signal.SIGKILL)
        return pid > 0 and not over

    async def kill_by_id(self, sandbox_id: str) -> bool:
        for _ in range(1000):
            if not (pid := self._pid(sandbox_id)):
                shutil.rmtree(Path(self.run_dir, sandbox_id), ignore_errors=True)
                self.started = [process for process in self.started if process.poll() is None]
                return True
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # with pid 1 all others end, and before it
            await asyncio.sleep(0.005)
        raise BackendError("The kill was not confirmed within 5 s.")

    async def list(self) -> list[Listed]:
        folders = [folder for folder in Path(self.run_dir).glob("*") if self._lives(folder.name)]
        return [Listed(folder.name, {"sandbox_id": folder.name, "dir": str(folder), "token": ""}) for folder in folders]

    async def check(self) -> Check:
        return Check(bool(self.bwrap), "" if self.bwrap else "apt-get install bubblewrap", self.isolation)
