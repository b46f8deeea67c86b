"""Sets of wheels, unpacked once: as a folder that sandboxes of this machine see read-only, or as an archive for those elsewhere."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from executions.packages import wheels
from executions.packages.index import alone, digest_of, kept, place

UNUSED_SECONDS = 30 * 86_400
COMPILE_SECONDS = 120


def digest(hashes: Iterable[str]) -> str:
    """The name of a set of wheels."""
    return digest_of("layer 1", sorted(hashes))


def folder(hashes: Iterable[str], under: Path, *, compiled: bool) -> str:
    """The name of the folder below `under` that holds these wheels of the store, unpacked now if it is not there."""
    wanted = sorted(hashes)
    name = digest(wanted)
    home = under / name
    if not home.exists():
        with alone(home):
            if not home.exists():
                with tempfile.TemporaryDirectory(prefix=".making-", dir=under) as made:
                    target = Path(made) / name
                    _unpack(wanted, target)
                    if compiled:
                        _compile(target)
                    target.rename(home)
    return name


def archive(hashes: Iterable[str]) -> tuple[Path, str]:
    """A tar of the same, and its SHA-256."""
    wanted = sorted(hashes)
    path = place("archives") / f"{digest(wanted)}.tar"
    noted = path.with_suffix(".sha256")
    if not noted.exists():
        with alone(path):
            if not noted.exists():
                with tempfile.TemporaryDirectory(prefix="pack-", dir=place("work")) as made:
                    target = Path(made) / "all"
                    _unpack(wanted, target)
                    _pack(target, Path(made) / "tar")
                    with (Path(made) / "tar").open("rb") as whole:
                        found = hashlib.file_digest(whole, "sha256").hexdigest()
                    (Path(made) / "tar").rename(path)
                    (Path(made) / "note").write_text(found)
                    (Path(made) / "note").rename(noted)
    os.utime(noted)
    return path, noted.read_text()


def _unpack(hashes: list[str], target: Path) -> None:
    target.mkdir(mode=0o755)
    for sha256 in hashes:
        wheels.unpack(kept(sha256), target)
    for path in [target, *target.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def _compile(target: Path) -> None:
    """Spare every sandbox the compiling: the source is read, never run, by a process of its own. Failing costs only time."""
    compiling = [
        "-m",
        "compileall",
        "-q",
        "--invalidation-mode",
        "unchecked-hash",
        "-s",
        str(target),
        "-p",
        "/opt/packages",
    ]
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8"}
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", *compiling, str(target)],
            env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMPILE_SECONDS,
        )  # fmt: skip
    except (subprocess.TimeoutExpired, OSError):
        pass


def _pack(target: Path, path: Path) -> None:
    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 1000
        info.uname = info.gname = "user"
        info.mtime = 0
        return info

    with tarfile.open(path, "w") as tar:
        for child in sorted(target.iterdir()):
            tar.add(child, arcname=child.name, filter=plain)


def sweep(layers: Iterable[Path], wanted: set[str]) -> None:
    """Remove what nothing has asked for in a month; `wanted` folders are the locks' own, and stay."""
    old = time.time() - UNUSED_SECONDS
    for noted in [*place("archives").glob("*.sha256"), *place("wheels").glob("*/*.json")]:
        if noted.stat().st_mtime < old:
            noted.with_suffix(".tar" if noted.suffix == ".sha256" else "").unlink(missing_ok=True)
            noted.unlink(missing_ok=True)
    for answer in place("resolved").glob("*.json"):
        if answer.stat().st_mtime < time.time() - 86_400:
            answer.unlink(missing_ok=True)
    for under in layers:
        for cut_short in under.glob(".making-*"):
            if cut_short.stat().st_mtime < old:
                shutil.rmtree(cut_short, ignore_errors=True)
        for home in under.glob("[0-9a-f]*"):
            if home.is_dir() and home.name not in wanted and home.stat().st_mtime < old:
                shutil.rmtree(home, ignore_errors=True)
