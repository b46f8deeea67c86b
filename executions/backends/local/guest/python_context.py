"""A Python context: a fork of the warmed interpreter that runs cells for the agent.

It has three channels to the agent: the pipes that are its stdout and stderr (so that what subprocesses print streams,
too) and a socket for the rest. Before Python writes to one, it waits until the agent has read the others, so
everything arrives in the order in which it happened, without threads and without a protocol in the output.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import importlib
import io
import json
import os
import signal
import site
import socket
import sys
import termios
import time
from typing import Any

from IPython.core.async_helpers import get_asyncio_loop

from . import places

PRELOADED = ("numpy", "pandas", "matplotlib", "matplotlib.pyplot", "e2b_charts", "orjson")
WARM_CELLS = {
    "": ["print('x')", "[1, {'a': 2}]", "1/0", "await __import__('asyncio').sleep(0)", "%pwd", "x = 1\nx"],
    "numpy": ["import numpy as np\nnp.arange(4).reshape(2, 2) @ np.ones(2)"],
    "pandas": [
        "import pandas as pd\npd.DataFrame({'a': [1, 2], 'b': ['x', None]})",
        "pd.DataFrame({'a': [1, 2]}).a.sum()",
    ],
    "matplotlib.pyplot": ["import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.title('x')\nplt.show()"],
}

DATA_MIB = 256  # of RLIMIT_DATA at least; more only where the sandbox has more memory

shell: Any = None  # made once, in the zygote, like the next
font_list: tuple[str, bytes] | None = None
ours: list[str] = []  # our modules; looking through all of them in each fork would copy half a thousand pages


def warm() -> dict[str, Any]:
    """Import and exercise what the template has; returns what it found."""
    global shell, font_list, ours
    from . import shell as shells

    shell = shells.make()
    found = {}
    for name in PRELOADED:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        if "." not in name:
            found[name] = getattr(module, "__version__", "")
    if "matplotlib" in found:
        shell.enable_matplotlib("inline")
    output, sys.stdout = sys.stdout, io.StringIO()
    try:
        for module, cells in WARM_CELLS.items():
            if module in sys.modules or not module:
                for cell in cells:
                    shell.run_cell(cell, store_history=True)
    finally:
        sys.stdout = output
    shell.reset(new_session=True)
    get_asyncio_loop().close()  # a loop must not be shared by forks; each makes its own
    for leftover in ("last_type", "last_value", "last_traceback", "last_exc"):
        vars(sys).pop(leftover, None)
    font_list = _font_list()
    ours = [name for name in sys.modules if name == "wire" or name.partition(".")[0] == "guest"]
    return {"python": sys.version.split()[0], "packages": found}


def rehearse() -> None:
    """Run a cell that leaves nothing behind."""
    shell.run_cell("None", store_history=False, silent=True)
    if "pandas" in sys.modules:
        shell.run_cell("__import__('pandas').DataFrame({'a': [1, 2]}).a.sum()", store_history=False, silent=True)


def _font_list() -> tuple[str, bytes] | None:
    """The name and content of matplotlib's font cache, so that scripts in the sandbox need not build their own."""
    folder = os.environ.get("MPLCONFIGDIR", "")
    names = [n for n in os.listdir(folder) if n.startswith("fontlist")] if os.path.isdir(folder) else []
    if not names:
        return None
    with open(os.path.join(folder, names[0]), "rb") as file:
        return names[0], file.read()


def _unread(descriptor: int) -> int:
    """Bytes that the agent has not taken yet, of a pipe or of the socket."""
    request = termios.TIOCOUTQ if descriptor > 2 else termios.FIONREAD
    return int.from_bytes(fcntl.ioctl(descriptor, request, b"\0\0\0\0"), sys.byteorder)


class Channels:
    """Everything that leaves a context, in order."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.owner = os.getpid()

    def wait_for_others(self, mine: int) -> None:
        if os.getpid() != self.owner:
            return  # a fork of the user's has no turn to wait for
        for descriptor in (1, 2, self.control.fileno()):
            pause = 0.00002
            while descriptor != mine and _unread(descriptor):
                time.sleep(pause)
                pause = min(pause * 2, 0.01)

    def send(self, **event: Any) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        if os.getpid() != self.owner:
            return  # nor has it anything to say about the cell
        line = json.dumps(event, default=repr).encode() + b"\n"
        self.wait_for_others(self.control.fileno())
        self.control.sendall(line)


class Raw(io.RawIOBase):
    """A standard stream that waits for its turn."""

    def __init__(self, descriptor: int, channels: Channels) -> None:
        self.descriptor, self.channels = descriptor, channels

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def write(self, data: Any) -> int:
        try:
            self.channels.wait_for_others(self.descriptor)
        except OSError:
            pass  # the user closed one of them
        return os.write(self.descriptor, data)


def _stream(descriptor: int, channels: Channels) -> io.TextIOWrapper:
    buffered = io.BufferedWriter(Raw(descriptor, channels), 64 * 1024)
    return io.TextIOWrapper(buffered, "utf-8", "backslashreplace", newline="\n", line_buffering=True)


def run(control: socket.socket, environment: dict[str, str], limits: dict[str, int]) -> None:
    """Run cells until the agent hangs up. The process is already a guest."""
    channels = Channels(control)
    sys.stdout, sys.stderr = _stream(1, channels), _stream(2, channels)
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    shell.send = channels.send
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as any Python has it, like the next
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for name in ours:
        sys.modules.pop(name, None)  # users may have modules of these names
    sys.path[:] = ["", *(p for p in sys.path if p and p != places.ours), places.LAYER, places.packages()]
    sys.argv = [""]
    os.environ.clear()
    os.environ.update(environment)
    site.USER_BASE = site.USER_SITE = None
    site.getusersitepackages()  # anew: they were the zygote's
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # the fork shares it with every sandbox of this template
    asyncio.set_event_loop(get_asyncio_loop())  # not the agent's, which this fork has inherited
    gc.freeze()
    with control.makefile("rb") as requests:
        for line in requests:
            _run_cell(json.loads(line), channels)
    os._exit(0)


def _run_cell(request: dict[str, Any], channels: Channels) -> None:
    before = {name: os.environ.get(name) for name in request["env"]}
    os.environ.update(request["env"])
    channels.send(type="count", execution_count=shell.execution_count)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            shell.run_cell(request["code"], store_history=True)
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:  # between the cell's last line and ours
        channels.send(type="error", name="KeyboardInterrupt", value="", traceback="KeyboardInterrupt")
    if os.getpid() != channels.owner:
        os._exit(0)  # a fork that came to the cell's end: the next cell is not its own
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    channels.send(type="end")
