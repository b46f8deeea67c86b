"""Makes `.venv` hold what a lock names. Needs nothing but Python and its venv; a second call changes nothing.

    python3 deploy/bootstrap.py [requirements.txt | tests/requirements.txt]

pip brings a hash-pinned uv, uv brings the rest (pip does, where uv cannot). Every failure is one sentence and the
command that mends it.
"""

import hashlib
import os
import re
import shutil
import ssl
import subprocess
import sys

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(HOME, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")
UV = os.path.join(VENV, "bin", "uv")
STAMP = os.path.join(VENV, "installed.txt")  # the hash of each lock that is satisfied
PRODUCT = "requirements.txt"  # every other lock contains this one (tests/test_house.py holds it to that)
NEEDED_BYTES = 700 << 20

CAUSES = (  # what pip says, in lower case → one sentence, and what mends it
    (r"no space left", "The disk is full.", "df -h .   (free about 1 GB, then run the same command again)"),
    (r"read-only file system|permission denied", "The folder cannot be written.", "sudo chown -R $(id -un) " + HOME),
    (r"do not match the hashes", "A package that came is not the one that was locked.",
     "set PIP_INDEX_URL to another package index, then run the same command again"),
    (r"connection|timed out|name resolution|no matching distribution|max retries", "No package index can be reached.",
     "set PIP_INDEX_URL (or HTTPS_PROXY) to reach one, then run the same command again"),
)  # fmt: skip


class Unable(Exception):
    """The start cannot go on: one sentence, and what mends it."""

    def __init__(self, sentence, remedy):
        super().__init__("{}\n  → {}".format(sentence, remedy))


def main(lock=PRODUCT):
    if sys.version_info < (3, 11):
        found = ".".join(map(str, sys.version_info[:2]))
        raise Unable("Sandgate needs Python 3.11 or newer; this is " + found + ".", "make run PYTHON=python3.12")
    wanted = {fingerprint(lock), fingerprint(PRODUCT)}
    if os.path.exists(PYTHON) and fingerprint(lock) in satisfied():
        return
    if not os.access(VENV if os.path.exists(VENV) else HOME, os.W_OK):
        raise Unable("The folder " + HOME + " cannot be written.", "sudo chown -R $(id -un) " + HOME)
    if shutil.disk_usage(HOME).free < NEEDED_BYTES:
        raise Unable("The disk is full: {} MB are needed.".format(NEEDED_BYTES >> 20), "df -h " + HOME)
    pin = uv_pin()
    if output([PYTHON, "-c", "import sys; print(sys.version)"]) != sys.version or pin.split()[0] != uv_here():
        make_venv()
        install_uv(pin)
    say("Installing " + lock + " into .venv (once).")
    install(lock)
    with open(STAMP, "w") as file:
        file.write("\n".join(wanted))


def make_venv():
    try:
        import ensurepip  # noqa: F401  (Debian packs it apart)
        import venv  # noqa: F401
    except ImportError:
        raise Unable("This Python has no venv module.", "sudo apt-get install -y python3-venv") from None
    say("Making .venv with Python {}.{}.{}.".format(*sys.version_info[:3]))
    run([sys.executable, "-m", "venv", "--clear", VENV])


def install_uv(pin):
    path = os.path.join(VENV, "uv.txt")
    with open(path, "w") as file:
        file.write(pin)
    run([PYTHON, "-m", "pip", "install", "-q", "--require-hashes", "-r", path])


def install(lock):
    path = os.path.join(HOME, lock)
    with_uv = [UV, "pip", "install", "-q", "--compile-bytecode", "--python", PYTHON, "-r", path]
    known = ssl.get_default_verify_paths()
    if known.cafile or (known.capath and os.listdir(known.capath)):
        with_uv.append("--system-certs")  # an organisation's own proxy is trusted by the machine, not by uv
    if subprocess.run(with_uv, stdin=subprocess.DEVNULL).returncode:
        say("uv cannot (above); pip tries, with the index and the proxy that it is set up for.")
        run([PYTHON, "-m", "pip", "install", "-q", "--require-hashes", "-r", path])


def run(command):
    """Run it; a failure shows its own words, then the cause in ours."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode == 0:
        return
    words = done.stdout.decode(errors="replace")
    sys.stderr.write(words[-4000:])
    for pattern, sentence, remedy in CAUSES:
        if re.search(pattern, words.lower()):
            raise Unable(sentence, remedy)
    raise Unable("This did not work: " + " ".join(command), "read the lines above, then run the same command again")


def uv_pin():
    """The lock's own entry for uv, with its hashes."""
    with open(os.path.join(HOME, PRODUCT)) as file:
        return re.search(r"^uv==(?:.*\\\n)+.*--hash.*\n", file.read(), re.M).group(0)


def uv_here():
    return output([UV, "--version"]).replace("uv ", "uv==").split(" ")[0]


def fingerprint(lock):
    with open(os.path.join(HOME, lock), "rb") as file:
        return hashlib.sha256(file.read() + sys.version.encode()).hexdigest()


def satisfied():
    try:
        with open(STAMP) as file:
            return file.read().split()
    except OSError:
        return []


def output(command):
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.decode().strip()
    except OSError:
        return ""


def say(line):
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2])
    except (Unable, OSError) as e:
        sys.exit("\n{}".format(e))
    except KeyboardInterrupt:
        sys.exit(130)
