"""The minimal read-only root that the zygote and its sandboxes see; all of it is listed here."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from guest import linux

HERE = Path(__file__).resolve().parent.parent
OURS = "/opt/sandgate"  # the guest's part of this product, inside
OWN_PACKAGES = ("opt/packages", "/run/packages")  # each sandbox has a link there to its agent's
SHADOWED = ("/home/user", "/tmp", "/dev/shm")  # private to each sandbox, mounted over whatever is there
LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
SHOWN_OF_ETC = (
    "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "fonts", "ssl/certs", "ssl/openssl.cnf", "pki/tls/certs",
    "ca-certificates", "alternatives", "mime.types", "services", "protocols", "bash.bashrc", "inputrc", "terminfo",
    "nsswitch.conf", "magic", "R", *(path.name for path in Path("/etc").glob("java-*")),
)  # fmt: skip
WRITTEN = {
    "etc/passwd": "root:x:0:0:root:/root:/usr/sbin/nologin\nuser:x:1000:1000:user:/home/user:/bin/bash\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\nuser:x:1000:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
    "etc/resolv.conf": "",
    "etc/hostname": "sandbox\n",
    "etc/profile": 'for f in ~/.profile.d/*.sh; do [ -r "$f" ] && . "$f"; done; unset f\n',
}
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
DEVICE_LINKS = {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2", "ptmx": "pts/ptmx"}
EMPTY = (
    "proc",
    "tmp",
    "dev/pts",
    "dev/shm",
    "home/user",
    "run",
    "var",
    "sys",
    "mnt",
    "root",
    "etc/ssl",
    "etc/pki/tls",
    "opt",
)


def prefixes(facts: dict[str, list[str]]) -> list[str]:
    """The folders of a template's interpreter that /usr does not hold, outermost only. ValueError for a system folder."""
    found: list[str] = []
    for path in sorted({os.path.realpath(p) for p in facts["prefixes"]} | set(facts["prefixes"])):
        if path == "/usr" or path.startswith("/usr/") or any(path.startswith(f + "/") for f in found):
            continue
        if path.count("/") < 2 or path in SHADOWED or path.split("/")[1] in ("proc", "dev", "etc", *LINKS):
            raise ValueError(f"The interpreter's prefix {path} would show too much of this machine.")
        found.append(path)
    return found


def build(at: str, shown: list[str], layers: str) -> None:
    """Build the root on a tmpfs at `at` (an empty folder) in the caller's own mount namespace, and move into it."""
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    opened = {path: os.open(path, os.O_PATH) for path in shown}  # the new mount may cover them
    opened[layers] = os.open(layers, os.O_PATH)  # at their own path, so that no mount tells of another one
    linux.mount("sandgate", at, "tmpfs", linux.MS_NOSUID, "size=16m,nr_inodes=4096,mode=755")
    root = Path(at)
    for folder in EMPTY:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, text in WRITTEN.items():
        (root / name).write_text(text)
    _show("/usr", root / "usr")
    for link in LINKS:
        if os.path.islink(f"/{link}"):
            (root / link).symlink_to(os.readlink(f"/{link}"))
        elif os.path.isdir(f"/{link}"):
            _show(f"/{link}", root / link)
    for name in SHOWN_OF_ETC:
        if os.path.exists(f"/etc/{name}"):
            _show(f"/etc/{name}", root / "etc" / name)
    (root / "var/tmp").symlink_to("/tmp")
    (root / OWN_PACKAGES[0]).symlink_to(OWN_PACKAGES[1])
    for device in DEVICES:
        (root / "dev" / device).touch()
        linux.mount(f"/dev/{device}", str(root / "dev" / device), None, linux.MS_BIND)
        linux.harden(str(root / "dev" / device), flags=linux.MS_NOSUID | linux.MS_NOEXEC)
    for name, target in DEVICE_LINKS.items():
        (root / "dev" / name).symlink_to(target)
    ours = [path for path in HERE.glob("guest/**/*") if path.is_file() and path.parent.name != "__pycache__"]
    for source in (*ours, HERE.parent / "wire.py"):  # copied: a mount would tell where we are installed
        copy = root / OURS[1:] / source.relative_to(HERE if source.is_relative_to(HERE) else HERE.parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())
    for path, descriptor in opened.items():
        _show(f"/proc/self/fd/{descriptor}", root / path[1:])
        os.close(descriptor)
    # before the old root goes: in a user namespace a new /proc needs another one that is wholly visible
    linux.mount("proc", str(root / "proc"), "proc", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
    linux.pivot_root(at)
    linux.mount(
        "sandgate", "/run", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "size=64m,mode=1777"
    )  # the zygote scribbles
    linux.harden("/", flags=linux.MS_RDONLY | linux.MS_NOSUID)  # not nodev: the six devices are its children's matter


def _show(source: str, target: Path) -> None:
    """Bind one file or folder read-only; what is mounted below it comes along, read-only too."""
    if stat.S_ISDIR(os.stat(source).st_mode):
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    linux.mount(source, str(target), None, linux.MS_BIND | linux.MS_REC)
    linux.harden(str(target), recursive=True)
