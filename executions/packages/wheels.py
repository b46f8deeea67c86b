"""Wheels are what a stranger sent: name, size and every entry are looked at before a byte is unpacked, and nothing of them is run."""

from __future__ import annotations

import re
import stat
import zipfile
import zlib
from collections.abc import Iterator
from email.parser import HeaderParser
from functools import lru_cache
from pathlib import Path, PurePosixPath

from packaging import tags
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from executions.errors import InstallFailed

WHEEL_BYTES = 1 << 30
UNPACKED_BYTES = 3 << 30
EXPANSION = 40  # unpacked to packed; real wheels stay below 15
EXPANSION_FREE_BYTES = 32 << 20
FILES = 60_000
DIRECTORY_BYTES = 16 << 20  # of the list of entries: 280 for each of so many files
END64_BYTES = 76  # which may stand between the list and its end
METADATA_BYTES = 1 << 20
PIECE_BYTES = 1 << 20
LEFT_OUT = re.compile(r"[^/]*\.pth|(site|user)customize([./].*)?")  # a Python would run these by itself
DATA = re.compile(r"[^/]+\.data/(purelib|platlib)/(.+)")
GLIBC = 28  # manylinux_2_28: what uv resolves for, and any machine of these days has
LICENCES = {
    "MIT License": "MIT", "MIT No Attribution License (MIT-0)": "MIT-0", "BSD License": "BSD", "ISC License (ISCL)": "ISC",
    "Apache Software License": "Apache-2.0", "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0", "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense", "GNU General Public License v3 (GPLv3)": "GPL-3.0-only",
    "GNU General Public License v2 (GPLv2)": "GPL-2.0-only", "GNU General Public License v3 or later (GPLv3+)": "GPL-3.0-or-later",
    "GNU General Public License v2 or later (GPLv2+)": "GPL-2.0-or-later",
    "GNU Lesser General Public License v3 (LGPLv3)": "LGPL-3.0-only", "GNU Affero General Public License v3": "AGPL-3.0-only",
    "GNU Affero General Public License v3 or later (AGPLv3+)": "AGPL-3.0-or-later",
}  # fmt: skip


@lru_cache(16)
def _supported(python: str, machine: str) -> dict[tags.Tag, int]:
    """The tags of such a Python on Linux, best first."""
    version = tuple(map(int, python.split(".")))
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(GLIBC, 4, -1)]
    platforms += [f"manylinux2014_{machine}", f"manylinux2010_{machine}", f"manylinux1_{machine}", f"linux_{machine}"]
    own = tags.cpython_tags(version, platforms=platforms)
    every = [*own, *tags.compatible_tags(version, interpreter=f"cp{version[0]}{version[1]}", platforms=platforms)]
    return {tag: rank for rank, tag in reversed(list(enumerate(every)))}


def fitness(name: str, python: str, machine: str) -> int | None:
    """How well this wheel fits, 0 best; None where it does not, or where its name is none."""
    ranks = _supported(python, machine)
    try:
        found = [ranks[tag] for tag in parse_wheel_filename(name)[3] if tag in ranks]
    except (InvalidWheelFilename, ValueError):
        return None
    return min(found, default=None)


def examined(path: Path, *, wheel: str, name: str, version: str) -> dict[str, object]:
    """Its licence ("" unknown) and the names that it needs. InstallFailed for a wheel that is not what it says, or an attack."""
    try:
        said_name, said_version, _, _ = parse_wheel_filename(wheel)
        with _opened(path, wheel) as archive:
            _check(archive, path.stat().st_size, wheel)
            headers = HeaderParser().parsestr(_metadata(archive, wheel))
    except InstallFailed:
        raise
    except (
        InvalidWheelFilename,
        zipfile.BadZipFile,
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        EOFError,
        zlib.error,
    ) as problem:
        raise InstallFailed(f"{wheel} is no wheel that can be read: {problem}") from None
    inside = (canonicalize_name(headers.get("Name", "")), headers.get("Version", "").strip())
    is_it = inside[0] == name and _same(inside[1], version)
    if said_name != name or not _same(str(said_version), version) or not is_it:
        raise InstallFailed(f"{wheel} says that it is {inside[0]} {inside[1]}, not {name} {version}.")
    return {"licence": _licence(headers), "needs": sorted(set(_needs(headers.get_all("Requires-Dist", []))))}


def _same(one: str, other: str) -> bool:
    try:
        return Version(one) == Version(other)
    except InvalidVersion:
        return False


def _opened(path: Path, wheel: str) -> zipfile.ZipFile:
    """ZipFile makes an object for each entry as it opens, so their list is looked at first. Raises InstallFailed, BadZipFile."""
    with path.open("rb") as file:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]  # what ZipFile itself goes by
        if end is None:
            raise zipfile.BadZipFile("it is no zip file")
        size, before = end[zipfile._ECD_SIZE], end[zipfile._ECD_LOCATION]  # type: ignore[attr-defined]
        if size > DIRECTORY_BYTES:
            raise InstallFailed(f"{wheel} has a list of files of {size:,} bytes: it is not read.")
        file.seek(max(0, before - size - END64_BYTES))
        entries = file.read(size + END64_BYTES).count(zipfile.stringCentralDir)  # type: ignore[attr-defined]
    if entries > FILES:
        raise InstallFailed(f"{wheel} has {entries:,} files; at most {FILES:,} are unpacked.")
    return zipfile.ZipFile(path)


def _check(archive: zipfile.ZipFile, packed: int, wheel: str) -> None:
    entries = archive.infolist()
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > min(UNPACKED_BYTES, packed * EXPANSION + EXPANSION_FREE_BYTES):
        raise InstallFailed(f"{wheel} would unpack to {unpacked:,} bytes, out of {packed:,}: it is not unpacked.")
    for entry in entries:
        kind = stat.S_IFMT(entry.external_attr >> 16)
        inside = _inside(entry.filename)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise InstallFailed(f"{wheel} has a link or a device in it: {entry.filename[:100]!r}.")
        odd = any(ord(letter) < 32 or letter == "\\" for letter in entry.orig_filename)
        if inside is None or odd or len(entry.filename) > 1000 or ":" in inside.parts[0]:
            raise InstallFailed(f"{wheel} has a path that leads out of it: {entry.filename[:100]!r}.")


def _inside(name: str) -> PurePosixPath | None:
    """The path below where it is unpacked; None for one that leads elsewhere, also once it has lost `x.data/purelib/`."""
    for told in (name, found[2] if (found := DATA.fullmatch(name)) else name):
        path = PurePosixPath(told)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            return None
    return path


def _metadata(archive: zipfile.ZipFile, wheel: str) -> str:
    found = [entry for entry in archive.infolist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", entry.filename)]
    if len(found) != 1 or found[0].file_size > METADATA_BYTES:
        raise InstallFailed(f"{wheel} has no METADATA that could be read.")
    return archive.read(found[0]).decode("utf-8", "replace")


def _licence(headers) -> str:
    if expression := headers.get("License-Expression"):
        return " ".join(expression.split())[:200]
    marks = [c.rpartition("::")[2].strip() for c in headers.get_all("Classifier", []) if c.startswith("License ::")]
    if known := [LICENCES.get(mark, mark) for mark in marks if mark != "OSI Approved"]:
        return " OR ".join(dict.fromkeys(known))[:200]
    text = (headers.get("License") or "").strip()
    return text if len(text) <= 60 and "\n" not in text and text.upper() != "UNKNOWN" else ""


def _needs(lines: list[str]) -> Iterator[str]:
    for line in lines:
        try:
            yield canonicalize_name(Requirement(line).name)
        except InvalidRequirement:
            continue


def unpack(path: Path, target: Path) -> None:
    """An examined wheel into a folder that Python imports from, readable by all; what a Python would run by itself stays out."""
    try:
        _unpack(path, target)
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, RuntimeError, EOFError, zlib.error) as problem:
        raise InstallFailed(f"{path.name} cannot be unpacked: {problem}") from None


def _unpack(path: Path, target: Path) -> None:
    with _opened(path, path.name) as archive:
        for entry in archive.infolist():
            if entry.is_dir() or (re.match(r"[^/]+\.data/", entry.filename) and not DATA.fullmatch(entry.filename)):
                continue  # scripts, headers, files for elsewhere
            inside = _inside(entry.filename)
            if inside is None:
                raise InstallFailed(f"{path.name} has a path that leads out of it: {entry.filename[:100]!r}.")
            name = str(inside)
            if LEFT_OUT.fullmatch(name):
                continue
            place = target / inside
            place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            left = entry.file_size
            with archive.open(entry) as source, place.open("wb") as file:
                while piece := source.read(PIECE_BYTES):
                    left -= len(piece)
                    if left < 0:
                        raise InstallFailed(f"{path.name}: {name[:100]!r} is larger than it says.")
                    file.write(piece)
            place.chmod(0o644)
