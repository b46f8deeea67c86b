"""Contents of artifacts: one file for each SHA-256 in the artifacts' folder, written once, never changed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from django.conf import settings

LEAVE_FREE_BYTES = 256 << 20  # of the disk: the database and the journal live there, too
ABANDONED_SECONDS = 3600  # what came in so long ago and was never finished belongs to a process that has died
SHARE = 1000  # contents that are looked at in one go, while nobody may add one


def place(sha256: str) -> Path:
    return Path(settings.ARTIFACTS_DIR, sha256[:2], sha256)


class Incoming:
    """A content on its way in: written in pieces, hashed as it comes, put in its place by `settle` or thrown away."""

    def __init__(self) -> None:
        folder = Path(settings.ARTIFACTS_DIR, "incoming")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = tempfile.NamedTemporaryFile(dir=folder, delete=False)  # noqa: SIM115
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def write(self, piece: bytes) -> None:
        """OSError, ENOSPC too where the disk is nearly full."""
        if shutil.disk_usage(settings.ARTIFACTS_DIR).free < LEAVE_FREE_BYTES + len(piece):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._file.write(piece)
        self._hash.update(piece)
        self.size_bytes += len(piece)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def settle(self) -> None:
        """Put it in its place, on disk for good. Call it within `adding`, with the row that refers to it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        target = place(self.sha256)
        target.parent.mkdir(mode=0o700, exist_ok=True)
        os.replace(self._file.name, target)  # the same content, where it was there already

    def close(self) -> None:
        self._file.close()
        Path(self._file.name).unlink(missing_ok=True)


@contextmanager
def adding() -> Iterator[None]:
    """While a content and the row that refers to it are added, nothing is swept away."""
    with _locked(fcntl.LOCK_SH):
        yield


@contextmanager
def _locked(how: int) -> Iterator[None]:
    folder = Path(settings.ARTIFACTS_DIR)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, how)
        yield
    finally:
        os.close(lock)


def pieces(sha256: str, start: int = 0, length: int | None = None, piece_bytes: int = 256 * 1024) -> Iterator[bytes]:
    """The content, or `length` bytes of it from `start` on. FileNotFoundError where it is gone."""
    with open(place(sha256), "rb", buffering=0) as file:
        file.seek(start)
        while (length is None or length > 0) and (
            piece := file.read(piece_bytes if length is None else min(piece_bytes, length))
        ):
            length = None if length is None else length - len(piece)
            yield piece


def sweep(referenced: Callable[[list[str]], set[str]]) -> int:
    """Remove the contents that no row refers to, and what was never finished. Returns how many.

    While somebody adds one, or a backup reads them all, nothing is waited for: the next round finds them, too.
    """
    folder = Path(settings.ARTIFACTS_DIR)
    if not folder.is_dir():
        return 0
    removed = 0
    for path in folder.glob("incoming/*"):
        try:
            if path.stat().st_mtime < time.time() - ABANDONED_SECONDS:
                path.unlink()
        except FileNotFoundError:
            continue
    names = [path.name for path in folder.glob("[0-9a-f][0-9a-f]/*") if len(path.name) == 64]
    for start in range(0, len(names), SHARE):
        share = names[start : start + SHARE]
        try:
            with _locked(fcntl.LOCK_EX | fcntl.LOCK_NB):
                for name in set(share) - referenced(share):
                    place(name).unlink(missing_ok=True)
                    removed += 1
        except BlockingIOError:
            continue
    return removed
