"""The peers, each measured in the same run as the product; they live in an environment of their own below var/bench."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.bench.load import Figures
from tests.bench.node import CELL, ROUNDS, SMALL
from tests.bench.peer import clock
from tests.bench.table import show, timed
from tests.product import HOME

FOLDER = HOME / "var" / "bench"
ROWS = {
    "gateway": "Jupyter Kernel Gateway",
    "gateway-nodelay": "Jupyter Kernel Gateway, TCP_NODELAY set on its websocket",
    "ipykernel": "ipykernel over zmq, no walls and no HTTP",
    "sandlock": "sandlock, one process per run",
}
SAYS = {
    "new": "new one to first result (numpy, pandas)",
    "new, nothing imported": "new one to first result, nothing imported",
    "warm": "warm cell",
    "nothing imported": "nothing imported",
}


def install() -> None:
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
    if not (FOLDER / "pyvenv.cfg").exists():
        subprocess.run([uv, "venv", "-q", "--python", sys.executable, FOLDER], check=True)
    arguments = ["--python", FOLDER, "--require-hashes", "-r", HOME / "tests/bench/peers.txt"]
    subprocess.run([uv, "pip", "install", "-q", *arguments], check=True)


def measure() -> dict[str, dict[str, Figures]]:
    """All of them; {peer: {what: figures}}."""
    install()
    python = FOLDER / "bin" / "python"
    found = {}
    for peer, named in ROWS.items():
        command = [python, HOME / "tests/bench/peer.py", peer, SMALL, CELL]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=300).stdout
        found[peer] = {what: show(f"{named}: {SAYS[what]}", timed(taken)) for what, taken in json.loads(answer).items()}
    found["bwrap"] = bwrap(python)
    return found


def bwrap(python: Path) -> dict[str, Figures]:
    """`bwrap … python -c` for each run, with the same interpreter and the same cell."""
    program = next(FOLDER.rglob("_bin/bwrap"))
    flags = "--ro-bind / / --dev /dev --proc /proc --tmpfs /run --unshare-all --die-with-parent".split()

    def run(code: str) -> float:
        return clock(lambda: subprocess.run([program, *flags, python, "-c", code], check=True))

    run(CELL)
    return {
        "new": show("bwrap, one process per run: numpy and pandas imported", timed([run(CELL) for _ in range(8)])),
        "small": show(
            "bwrap, one process per run: nothing imported", timed([run(SMALL) for _ in range(max(8, ROUNDS // 10))])
        ),
    }
