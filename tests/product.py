"""The product as its users start it: processes of their own, spoken to over sockets."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests import servers

HOME = Path(__file__).parent.parent


@dataclass
class Product:
    """A running Sandgate: where it is, the first key, and what its terminal shows."""

    url: str
    data: Path
    process: subprocess.Popen[str]
    key: str = ""
    sign_in_url: str = ""
    screen: list[str] = field(default_factory=list)

    def http(self, **options) -> httpx.Client:
        """A client with the first key."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False, **options)


def environment(data: Path, port: int, template_python: Path | None, **more: str) -> dict[str, str]:
    """A newcomer's environment: nothing of this test run's but the path and the data folder."""
    passed = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    named = {"SANDGATE_TEMPLATE_PYTHON": str(template_python)} if template_python else {}
    return {**passed, "SANDGATE_DATA": str(data), "PORT": str(port), "E2B_API_KEY": "", **named, **more}


def start(
    data: Path, port: int, template_python: Path | None = None, *, options: Sequence[str] = (), **more: str
) -> Product:
    """Start `manage.py serve` with these options; returns once it has shown its first screen. RuntimeError with all it said otherwise."""
    process = subprocess.Popen(
        [sys.executable, "manage.py", "serve", *options],
        cwd=HOME,
        env=environment(data, port, template_python, **more),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=servers.die_with_parent,
    )
    product = Product(url=f"http://127.0.0.1:{port}", data=data, process=process)
    if not servers.came(process, "Ctrl-C ends it", 120, product.screen) or process.poll() is not None:
        servers.end(process)
        raise RuntimeError("serve did not start:\n" + "".join(product.screen))
    text = "".join(product.screen)
    if key := re.search(r"^export SANDGATE_API_KEY=(\S+)$", text, re.M):
        product.key = key.group(1)
    if link := re.search(r"^\s+(http\S+)$", text, re.M):
        product.sign_in_url = link.group(1)
    return product


@contextmanager
def running_product(template_python: Path | None, **more: str) -> Iterator[Product]:
    with servers.folder() as data:
        product = start(data, servers.free_port(), template_python, **more)
        try:
            yield product
        finally:
            servers.end(product.process)


def descendants(pid: int) -> set[int]:
    """Every process below this one, also those in other namespaces."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def all_end(pids: set[int], seconds: float) -> bool:
    """True once every one of them has ended; False when one is alive after so long."""
    deadline = time.monotonic() + seconds
    for pid in pids:
        with suppress(ProcessLookupError):
            handle = os.pidfd_open(pid)
            try:
                ended, _, _ = select.select([handle], [], [], max(0, deadline - time.monotonic()))
            finally:
                os.close(handle)
            if not ended:
                return False
    return True
