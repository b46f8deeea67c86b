"""Out of an index into the store: uv resolves, wheels are fetched once and kept by the hash of their content.

Nothing of a package is run: only wheels are taken, and uv is told to build none. Everything here waits; call it in a thread.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import ssl
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

from django.conf import settings

from executions.backends.local.environment import uv_environ
from executions.errors import InstallFailed
from executions.packages import wheels
from executions.packages.decide import Item

UV_SECONDS = 120
FETCH_SECONDS = 600
RESOLVED_SECONDS = 600  # for which an answer of the index is believed
PASSED_ON = ("PATH", "LANG", "SSL_CERT_FILE", "SSL_CERT_DIR", "UV_SYSTEM_CERTS", "NO_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY",
             "no_proxy", "http_proxy", "https_proxy", "all_proxy")  # fmt: skip
OF_THE_MACHINE = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL")
CREDENTIALS = re.compile(r"(https?://)[^/@\s]*@")


def clean(text: str) -> str:
    """Without anybody's name and password in front of a host."""
    return CREDENTIALS.sub(r"\1", text)


def place(*names: str) -> Path:
    """A folder of the store, made when first needed."""
    folder = Path(settings.DATA, "packages", *names)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One at a time of all threads and processes that name this path; whoever dies lets go."""
    with open(path.with_name(f"{path.name}.lock"), "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def digest_of(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# Resolving


def resolved(
    asked: list[str], *, python: str, machine: str, present: dict[str, str], hold: dict[str, str] | None = None
) -> list[Item]:
    """What has to be added to `present` (name to version) for what is asked, at the versions to `hold` where one is named.

    InstallFailed where there is no such set.
    """
    hold = hold or {}
    environment = _environment()
    indexes = sorted((name, value) for name, value in environment.items() if "INDEX" in name)
    key = digest_of(sorted(asked), python, machine, sorted(present.items()), sorted(hold.items()), indexes)
    kept = place("resolved") / f"{key}.json"
    if (found := _kept(kept)) is not None:
        return found
    with alone(kept):
        if (found := _kept(kept)) is not None:
            return found
        with tempfile.TemporaryDirectory(prefix="resolve-", dir=place("work")) as folder:
            found = _compiled(Path(folder), asked, python, machine, present, hold, environment)
            whole = Path(folder) / "answer.json"
            whole.write_text(json.dumps([item.facts() for item in found]))
            whole.rename(kept)
    return found


def _kept(path: Path) -> list[Item] | None:
    try:
        if time.time() - path.stat().st_mtime > RESOLVED_SECONDS:
            return None
        told = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return [item_of(facts) for facts in told]


def item_of(facts: dict) -> Item:
    """What Item.facts() has told."""
    at = {n: facts[n] and datetime.fromisoformat(facts[n]) for n in ("published_at", "advised_at")}
    return Item(**facts | at)


def _compiled(
    folder: Path,
    asked: list[str],
    python: str,
    machine: str,
    present: dict[str, str],
    hold: dict[str, str],
    environment: dict[str, str],
) -> list[Item]:
    (folder / "asked.in").write_text("".join(f"{line}\n" for line in asked))
    pins = "".join(f"{name}=={v}\n" for name, v in sorted({**hold, **present}.items()) if "+" not in v)
    (folder / "present.txt").write_text(pins)
    _run(
        [
            _uv(), "pip", "compile", "asked.in", "-c", "present.txt", "--python-version", python, "--python", sys.executable,
            "--python-platform", f"{machine}-unknown-linux-gnu", "--no-build", "--no-config",
            "--no-python-downloads", "--no-header", "--format", "pylock.toml", "-q", "-o", "pylock.toml",
        ],
        folder,
        environment,
    )  # fmt: skip
    told = tomllib.loads((folder / "pylock.toml").read_text())
    private = urlsplit(settings.PACKAGE_INDEX_PRIVATE).netloc.rpartition("@")[2]
    found = []
    for package in told.get("packages", []):
        if present.get(package["name"]) != package.get("version"):
            found.append(_item(package, python, machine, private))
    return found


def _item(package: dict, python: str, machine: str, private: str) -> Item:
    name, version = package["name"], package.get("version", "")
    fitting = []
    for wheel in package.get("wheels", []):
        url = clean(wheel.get("url", ""))
        file = wheel.get("name") or unquote(urlsplit(url).path.rpartition("/")[2])
        rank = wheels.fitness(file, python, machine)
        if rank is not None and url.startswith(("http://", "https://")) and wheel.get("hashes", {}).get("sha256"):
            fitting.append((rank, file, url, wheel))
    if not fitting:
        raise InstallFailed(f"It cannot be installed: {name} {version} has no wheel with a hash for Python {python}.")
    _, file, url, wheel = min(fitting, key=lambda one: one[:2])
    at = wheel.get("upload-time")
    own = (package.get("index") or url) if private else ""
    return Item(
        name, version, False, wheel=file, url=url, sha256=wheel["hashes"]["sha256"], size_bytes=wheel.get("size"),
        published_at=at.replace(tzinfo=at.tzinfo or UTC) if isinstance(at, datetime) else None,
        private=bool(private) and urlsplit(own).netloc.rpartition("@")[2] == private,
    )  # fmt: skip


def _environment() -> dict[str, str]:
    """What uv is told: where the indexes are, which certificates to trust, and nothing else of ours."""
    known = uv_environ()
    told = {name: known[name] for name in PASSED_ON if name in known}
    told |= {"HOME": str(place("home")), "UV_CACHE_DIR": str(place("uv")), "UV_KEYRING_PROVIDER": "disabled"}
    if settings.PACKAGE_INDEX:
        told["UV_DEFAULT_INDEX"] = settings.PACKAGE_INDEX
    else:
        told |= {name: known[name] for name in OF_THE_MACHINE if name in known}
        if "PIP_INDEX_URL" in known and not told.keys() & {"UV_DEFAULT_INDEX", "UV_INDEX_URL"}:
            told["UV_DEFAULT_INDEX"] = known["PIP_INDEX_URL"]
    if settings.PACKAGE_INDEX_PRIVATE:
        told["UV_INDEX"] = settings.PACKAGE_INDEX_PRIVATE  # asked first; a name that it has is taken from nowhere else
    return told


def _uv() -> str:
    from uv import find_uv_bin

    try:
        return find_uv_bin()
    except FileNotFoundError:
        remedy = f"{sys.executable} -m pip install uv"
        raise InstallFailed("uv is not installed beside this server.", remedy=remedy) from None


def _run(argv: list[str], folder: Path, environment: dict[str, str]) -> None:
    try:
        done = subprocess.run(
            argv,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=UV_SECONDS,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise InstallFailed(f"The package index did not answer within {UV_SECONDS} s.") from None
    if done.returncode:
        said = " ".join(line.strip(" ×╰─▶│") for line in done.stderr.splitlines() if line.strip())
        raise InstallFailed(f"It cannot be installed: {clean(said)[:600]}")


# The store


def kept(sha256: str) -> Path:
    return place("wheels", sha256[:2]) / sha256


def told(items: Iterable[Item], facts: dict[str, dict]) -> None:
    """Say of each item what its wheel has told: licence, size, and who of them needs it."""
    found = list(items)
    for item in found:
        of_it = facts[item.sha256]
        item.licence, item.size_bytes = of_it["licence"], of_it["size"]
    for item in found:
        item.needed_by = sorted(o.name for o in found if o is not item and item.name in facts[o.sha256]["needs"])


def is_known(item: Item) -> bool:
    """Whether its wheel is in the store, examined."""
    return kept(item.sha256).with_name(f"{item.sha256}.json").exists()


def bytes_here(item: Item) -> int:
    """How much of its wheel has been fetched by now, by whichever process."""
    path = kept(item.sha256)
    for file in (path, path.with_name(f"{path.name}.part")):
        with suppress(OSError):
            return file.stat().st_size
    return 0


def have(item: Item) -> dict:
    """Its wheel, fetched and examined by whoever comes first of all threads and processes; what is known about it."""
    path = kept(item.sha256)
    noted = path.with_name(f"{path.name}.json")
    if not noted.exists():
        with alone(path):
            if not path.exists():
                _fetch(item, path)
            if not noted.exists():
                facts = wheels.examined(path, wheel=item.wheel, name=item.name, version=item.version)
                half = path.with_name(f"{path.name}.half")
                half.write_text(json.dumps(facts | {"wheel": item.wheel, "size": path.stat().st_size}))
                half.rename(noted)
    os.utime(noted)  # in use: the sweep leaves it
    facts = json.loads(noted.read_text())
    if facts["wheel"] != item.wheel:  # the same content under another name was examined as that
        wheels.examined(path, wheel=item.wheel, name=item.name, version=item.version)
    return facts


def _fetch(item: Item, path: Path) -> None:
    import httpx

    if (item.size_bytes or 0) > wheels.WHEEL_BYTES:
        raise InstallFailed(f"{item.wheel} has {item.size_bytes:,} bytes; at most {wheels.WHEEL_BYTES:,} are fetched.")
    digest, size, part = hashlib.sha256(), 0, path.with_name(f"{path.name}.part")
    deadline = time.monotonic() + FETCH_SECONDS
    try:
        with (
            httpx.Client(verify=ssl.create_default_context(), follow_redirects=True, timeout=30, auth=_login(item.url)) as client,
            client.stream("GET", item.url, headers={"Accept-Encoding": "identity"}) as answer,
            part.open("wb") as file,
        ):  # fmt: skip
            answer.raise_for_status()
            for piece in answer.iter_raw(wheels.PIECE_BYTES):
                size += len(piece)
                if size > wheels.WHEEL_BYTES or time.monotonic() > deadline:
                    raise InstallFailed(f"{item.wheel} is too large, or takes longer than {FETCH_SECONDS} s.")
                digest.update(piece)
                file.write(piece)
    except httpx.HTTPError as problem:
        said = clean(str(problem)) or type(problem).__name__
        raise InstallFailed(f"{item.wheel} could not be fetched: {said[:300]}") from None
    if digest.hexdigest() != item.sha256:
        part.unlink()
        raise InstallFailed(f"{item.wheel} is not what the index said: it has another hash.")
    part.rename(path)


def _login(url: str) -> tuple[str, str] | None:
    """The credentials of the index that this file is on."""
    for index in (settings.PACKAGE_INDEX_PRIVATE, settings.PACKAGE_INDEX):
        parts = urlsplit(index)
        file = urlsplit(url)
        if parts.username and (parts.scheme, parts.hostname, parts.port) == (file.scheme, file.hostname, file.port):
            return unquote(parts.username), unquote(parts.password or "")
    return None
