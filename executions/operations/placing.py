"""Wheels of the store into a sandbox that lives; and one pair of hands for many who want the same."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from executions import backends
from executions.backends.base import Handle
from executions.errors import InstallFailed
from executions.models import Sandbox
from executions.operations.bases import said
from executions.packages import layers

TARGET = "$HOME/.packages"  # behind the template's own packages on sys.path: never in front of them
TAKE = '[ -d "{target}" ] || mkdir -p "{target}"; tar -xf "{archive}" -C "{target}"; s=$?; rm -f "{archive}"; echo "{target}"; exit $s'
PROVE = 'printf "%s  %s\\n" {sha256} "{archive}" | sha256sum -c --status || {{ echo "the archive has another hash" >&2; exit 1; }}; '
# For the kernel that runs, and by a line in a folder of its own site for those that start later. The folder is named: E2B's kernel is
# root, and its home another one than that of commands.
SEE = """
def _see(folder):
    import importlib, os, site, sys
    if folder not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()
    for place in (*site.getsitepackages(), site.getusersitepackages()):
        try:
            os.makedirs(place, exist_ok=True)
            with open(os.path.join(place, "sandgate.pth"), "w") as line:
                line.write(folder + chr(10))
            break
        except OSError:
            pass
_see({folder!r})
del _see
"""
THREADS = 4  # that wait for an index or a disk

_threads = ThreadPoolExecutor(THREADS, "packages")
_flying: dict[tuple[int, str], asyncio.Future[Any]] = {}


async def once(key: str, work: Callable[[], Any]) -> Any:
    """Do it in a thread; whoever asks for the same meanwhile waits for the same, without a thread."""
    loop = asyncio.get_running_loop()
    mine = (id(loop), key)
    doing = _flying.get(mine)
    if doing is None:
        doing = _flying[mine] = loop.run_in_executor(_threads, work)
        doing.add_done_callback(lambda _: _flying.pop(mine, None))
    return await asyncio.shield(doing)


async def put(sandbox: Sandbox, hashes: Iterable[str], handle: Handle | None = None) -> None:
    """Have these wheels of the store in a live sandbox, importable at once. Raises InstallFailed."""
    wanted = sorted(hashes)
    archive, sha256 = await once(f"archive {layers.digest(wanted)}", partial(layers.archive, wanted))
    backend, machine = backends.get(sandbox.backend), handle or sandbox.machine
    name = f".packages-{secrets.token_hex(8)}.tar"  # two may install at once
    await backend.write_file(machine, f"/tmp/{name}", _pieces(archive))
    at = "${TMPDIR:-/tmp}/" + name  # to the API always in /tmp
    proof = PROVE.format(sha256=sha256, archive=at) if backend.remote else ""
    answer = await said(sandbox, proof + TAKE.format(target=TARGET, archive=at), machine)
    if not backend.capabilities.layers:  # where every Python looks there by itself nothing else is needed
        see = SEE.format(folder=answer.strip().rpartition("\n")[2])
        async for event in backend.run_code(machine, see, timeout_seconds=30):
            if event.kind == "error":
                raise InstallFailed(f"The sandbox's Python could not see the packages: {event.data['value'][:200]}")


async def _pieces(archive: Path) -> AsyncIterator[bytes]:
    with archive.open("rb") as f:
        while piece := await asyncio.to_thread(f.read, 1 << 20):
            yield piece
