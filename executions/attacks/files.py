"""Files as weapons: paths, links, special files, bombs, and what is left for the next tenant."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path
from typing import Any

from executions.attacks.arena import Arena, Attack, Ran, Through
from executions.backends.base import Handle
from executions.errors import BackendError, FileRefused

SECONDS = 6  # nothing that a guest names may hold a reader longer
READ_LIMIT = 64 << 20


async def _read(arena: Arena, handle: Handle, path: str) -> bytes:
    """Through where it hangs; FileRefused, BackendError."""
    read = bytearray()
    try:
        async with asyncio.timeout(SECONDS):
            async for piece in arena.backend.read_file(handle, path):
                read += piece
                if len(read) > READ_LIMIT:
                    raise Through(f"{path!r} never ends")
    except TimeoutError:
        raise Through(f"reading {path!r} hangs") from None
    return bytes(read)


async def _in_time(what: str, work: Awaitable[Any]) -> Any:
    try:
        return await asyncio.wait_for(work, SECONDS)
    except TimeoutError:
        raise Through(f"{what} hangs") from None


async def _links_lead_nowhere(arena: Arena, handle: Handle, ran: Ran) -> str:
    """What is read through the guest's links is the guest's world, never the host's."""
    with suppress(OSError, FileRefused):
        if Path("/etc/passwd").read_bytes() == await _read(arena, handle, "/home/user/links/passwd"):
            raise Through("the host's /etc/passwd came through a link")
    refused = 0
    for name in ("shadow", "environ", "zero", "tty", "loop", "up/etc/shadow", "fd", "kmsg", "mem", *["swap"] * 40):
        try:
            read = await _read(arena, handle, f"/home/user/links/{name}")
        except FileRefused:
            refused += 1
            continue
        if name not in ("swap", "environ") and read:
            raise Through(f"{name}: {read[:80]!r}")
        for secret in (*arena.secrets, "root:$", "root:!"):
            if secret.encode() in read:
                raise Through(f"a secret of the service came through {name}")
    for name in ("passwd", "dir/new", "swap"):
        with suppress(FileRefused):
            await _in_time(
                "writing through a link", arena.backend.write_file(handle, f"/home/user/links/{name}", b"owned")
            )
    with suppress(BackendError):  # while names come and go it may not become empty
        await _in_time("removing links", arena.backend.remove_file(handle, "/home/user/links"))
    with suppress(FileRefused):  # where the machine's own folders are not to be listed
        if "passwd" not in [entry.name for entry in await arena.backend.list_files(handle, "/etc")]:
            raise Through("removing a folder followed a link out of it")
    return f"{refused} refused, the rest was its own"


async def _names_stay_inside(arena: Arena, handle: Handle, ran: Ran) -> str:
    """Every name is refused, or is a file that can be read back at that very path."""
    outside = [
        "../../../../../../etc/cron.d/owned", "/etc/passwd", "/etc/ld.so.preload", "/opt/sandgate/guest/agent.py", "/usr/bin/python3",
        "/proc/1/mem", "/proc/sys/kernel/core_pattern", "/proc/1/oom_score_adj", "/dev/null/x", "/dev/sda", "/run/x", "/", "", ".",
        "nul\0name", "/home/user/../../etc/owned", "x" * 4097, "/" + "a/" * 2048, "b/" * 1500, "y" * 256,
    ]  # fmt: skip
    refused = 0
    for name in outside:
        if arena.isolation == "microvm" and name.startswith("/"):
            continue  # its own root, its own kernel
        try:
            await _in_time(f"writing {name[:40]!r}", arena.backend.write_file(handle, name, b"owned"))
        except FileRefused:
            refused += 1
        else:
            raise Through(f"{name[:60]!r} was written")
    for name in (
        "two\nlines",
        "-rf",
        "'; touch owned #",
        "$(touch owned)",
        "%2e%2e%2f",
        "é\u202e\u0301",
        "a" * 255,
        "~x",
    ):
        await arena.backend.write_file(handle, f"/home/user/names/{name}", name.encode())
        if await _read(arena, handle, f"/home/user/names/{name}") != name.encode():
            raise Through(f"{name!r} is not what was written")
    names = {entry.name for entry in await arena.backend.list_files(handle, "/home/user/names")}
    if "two\nlines" not in names or len(names) != 8:
        raise Through(f"the listing tells others: {names!r}")
    await arena.backend.remove_file(handle, "/home/user/names")
    return f"{refused} refused, 8 odd ones kept as they are"


async def _specials_do_not_hang(arena: Arena, handle: Handle, ran: Ran) -> str:
    refused = 0
    for name in ("fifo", "socket", "null", "zero", "tty", "ptmx", "pipe"):
        path = f"/home/user/specials/{name}"
        for what, work in (
            ("reading", _read(arena, handle, path)),
            ("writing", arena.backend.write_file(handle, path, b"x" * 70_000)),
        ):
            try:
                await _in_time(f"{what} {name}", work)
            except FileRefused:
                refused += 1
            else:
                raise Through(f"{what} {name} was allowed")
    await _in_time("listing", arena.backend.list_files(handle, "/home/user/specials"))
    await _in_time("removing", arena.backend.remove_file(handle, "/home/user/specials"))
    return f"{refused} refused at once"


async def _moving_files_end(arena: Arena, handle: Handle, ran: Ran) -> str:
    grown = await _read(arena, handle, "/home/user/growing")
    with suppress(BackendError):  # a file that becomes shorter under its reader breaks off
        for _ in range(20):
            await _read(arena, handle, "/home/user/breathing")
    return f"{len(grown):,} bytes, as when it was opened"


async def _deep_trees_end(arena: Arena, handle: Handle, ran: Ran) -> str:
    for path, depth in (("/home/user/deep", 1 << 30), ("/home/user/wide", 1 << 30)):
        with suppress(FileRefused, BackendError):
            await _in_time(f"listing {path}", arena.backend.list_files(handle, path, depth=depth))
        with suppress(FileRefused, BackendError):
            await _in_time(f"removing {path}", arena.backend.remove_file(handle, path))
    return "listed and removed, or refused, in time"


async def _strange_names_are_listed(arena: Arena, handle: Handle, ran: Ran) -> str:
    for entry in await arena.backend.list_files(handle, "/home/user/strange"):
        try:
            entry.name.encode()
        except UnicodeEncodeError:
            raise Through(f"{entry.name!r} is no text: it breaks whoever sends it on") from None
    await arena.backend.remove_file(handle, "/home/user/strange")
    return "all names are text"


async def _bombs_stay_small(arena: Arena, handle: Handle, ran: Ran) -> str:
    total = 0
    for entry in await arena.backend.list_files(handle, "/home/user/bombs"):
        read = await _read(arena, handle, entry.path)
        if len(read) != entry.size_bytes:
            raise Through(f"{entry.name} arrives as {len(read)} bytes, and is {entry.size_bytes}")
        total += len(read)
    return f"{total:,} bytes arrive as they are; nothing is unpacked"


async def _next_tenant(arena: Arena, handle: Handle, ran: Ran) -> str:
    async with arena.sandbox() as next_one:
        said = await arena.value(next_one, _LOOK)
        shell = await arena.run(
            next_one,
            Attack("look", (), command="echo $OWNED; type python3; ls -A ~; python3 -c 'import sys; print(sys.argv)'"),
        )
    for words in (repr(said), shell.stdout):
        if "owned" in words.lower():
            raise Through(f"the next sandbox finds {words[:200]}")
    return "the next sandbox finds nothing of it"


async def _twins_differ(arena: Arena, handle: Handle, ran: Ran) -> str:
    async with arena.sandbox() as one, arena.sandbox() as two:
        first, second = await arena.value(one, _DRAWS), await arena.value(two, _DRAWS)
        third = await arena.value(two, _DRAWS)
        context = await arena.backend.create_context(two, language="python")
        fourth = await _in_context(arena, two, context["id"])
    for other in (second, third, fourth):
        if equal := [name for name in first if first[name] == other[name]]:
            raise Through(f"two sandboxes draw the same {', '.join(equal)}")
    return f"{len(first)} sources differ in two sandboxes and two contexts"


async def _in_context(arena: Arena, handle: Handle, context: str) -> Any:
    import ast

    async for event in arena.backend.run_code(handle, _DRAWS, context_id=context, timeout_seconds=10):
        if event.kind == "result" and event.data["main"]:
            return ast.literal_eval(event.data["mime"]["text/plain"])
    raise Through("a new context does not answer")


async def _agent_survives(arena: Arena, handle: Handle, ran: Ran) -> str:
    fresh = await arena.backend.create_context(handle, language="python")
    async for event in arena.backend.run_code(handle, "1", context_id=fresh["id"], timeout_seconds=10):
        if event.kind == "error":
            raise Through(f"a new context is broken: {event.data['value'][:100]}")
    await arena.backend.remove_context(handle, fresh["id"])
    return "; ".join(sorted(set(ran.refused.values())))


_LOOK = """
import os, sys
[os.environ.get('OWNED'), getattr(sys, 'owned', None), sorted(os.listdir('/tmp')), sorted(os.listdir('/dev/shm')), 'owned' in globals()]
"""
_DRAWS = """
import os, random, secrets, tempfile, uuid
_drawn = {'random': random.random(), 'system': random.SystemRandom().random(), 'uuid4': str(uuid.uuid4()), 'uuid1': str(uuid.uuid1()),
          'urandom': os.urandom(8), 'secrets': secrets.token_hex(8), 'temporary name': tempfile.mktemp(),
          'temporary file': os.path.basename(tempfile.mkdtemp()), 'instance': random.Random().random()}
try:
    import numpy
    _drawn |= {'numpy': float(numpy.random.rand()), 'numpy generator': float(numpy.random.default_rng().random())}
except ImportError:
    pass
_drawn
"""

ATTACKS = (
    Attack(
        "links_on_download_paths", ("namespaces",), judge=_links_lead_nowhere, fresh=True,
        code=r"""
os.makedirs('/home/user/links', exist_ok=True)
os.chdir('/home/user/links')
for name, target in {'passwd': '/etc/passwd', 'shadow': '/etc/shadow', 'environ': '/proc/1/environ', 'zero': '/dev/zero', 'tty': '/dev/tty',
                     'loop': 'loop', 'up': '/proc/1/root', 'fd': '/proc/1/fd/3', 'kmsg': '/proc/kmsg', 'mem': '/proc/1/mem', 'dir': '/etc'}.items():
    os.symlink(target, name)
attempt('a hard link to a file of the system', lambda: os.link('/etc/passwd', 'hard'))
attempt('a hard link to a file of the template', lambda: os.link(os.__file__, 'hard'))
if os.fork() == 0:
    os.setsid()
    until = time.monotonic() + 8
    while time.monotonic() < until:
        try:
            os.symlink('/proc/1/environ', 'a'); os.rename('a', 'swap')
            open('b', 'w').close(); os.rename('b', 'swap')
        except OSError:
            break
    os._exit(0)
os.chdir('/home/user')
""",
    ),
    Attack("hostile_names", ("agent",), judge=_names_stay_inside),
    Attack(
        "special_files", ("agent",), judge=_specials_do_not_hang,
        code=r"""
os.makedirs('/home/user/specials', exist_ok=True)
os.mkfifo('/home/user/specials/fifo')
listener = socket.socket(socket.AF_UNIX)
listener.bind('/home/user/specials/socket')
for name in ('null', 'zero', 'tty', 'ptmx'):
    os.symlink(f'/dev/{name}', f'/home/user/specials/{name}')
os.symlink('/proc/1/fd/0', '/home/user/specials/pipe')
""",
    ),
    Attack(
        "files_that_move_while_read", ("agent",), judge=_moving_files_end, fresh=True,
        code=r"""
for name in ('growing', 'breathing'):
    with open(f'/home/user/{name}', 'wb') as file:
        file.write(b'x' * (4 << 20))
if os.fork() == 0:
    os.setsid()
    until = time.monotonic() + 6
    with open('/home/user/growing', 'ab') as growing:
        while time.monotonic() < until and growing.tell() < 200 << 20 and not time.sleep(0.0005):
            growing.write(b'x' * (1 << 16))
            os.truncate('/home/user/breathing', 0)
            os.truncate('/home/user/breathing', 4 << 20)
    os._exit(0)
""",
    ),
    Attack(
        "deep_and_wide_trees", ("agent",), judge=_deep_trees_end, fresh=True,
        code=r"""
os.mkdir('/home/user/wide')
for n in range(15_000):
    os.mkdir(f'/home/user/wide/{n}')
os.mkdir('/home/user/deep')
os.chdir('/home/user/deep')
for _ in range(3000):
    os.mkdir('d')
    os.chdir('d')
os.chdir('/home/user')
""",
    ),
    Attack(
        "names_that_are_no_text", ("agent",), judge=_strange_names_are_listed,
        code=r"""
os.makedirs('/home/user/strange', exist_ok=True)
for name in (b'\xff\xfe', b'\xed\xa0\x80', b'\x1b]0;x\x07', b'a\nb', b'<script>', b'\xc3\x28'):
    open(b'/home/user/strange/' + name, 'w').close()
os.symlink(b'\xff\xfe', b'/home/user/strange/link')
""",
    ),
    Attack(
        "archive_bombs", ("agent",), judge=_bombs_stay_small, seconds=40,
        code=r"""
import bz2, gzip, io, tarfile, zipfile, zlib
os.makedirs('/home/user/bombs', exist_ok=True)
zeros = bytes(100 << 20)
with zipfile.ZipFile('/home/user/bombs/bomb.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('zeros', zeros)
    archive.writestr('../../../../etc/owned', 'x')
nested = open('/home/user/bombs/bomb.zip', 'rb').read()
for _ in range(5):
    into = io.BytesIO()
    with zipfile.ZipFile(into, 'w', zipfile.ZIP_DEFLATED) as archive:
        for n in range(16):
            archive.writestr(f'{n}.zip', nested)
    nested = into.getvalue()[:4 << 20]
packed = {'bomb.gz': gzip.compress(zeros), 'bomb.bz2': bz2.compress(zeros[:10 << 20]), 'bomb.html': zlib.compress(zeros)}
for name, data in {'nested.zip': nested, **packed}.items():
    with open(f'/home/user/bombs/{name}', 'wb') as file:
        file.write(data)
with tarfile.open('/home/user/bombs/bomb.tar', 'w') as archive:
    for name, kind, link in (('/etc/owned', tarfile.REGTYPE, ''), ('up', tarfile.SYMTYPE, '/'), ('device', tarfile.CHRTYPE, ''),
                             ('hard', tarfile.LNKTYPE, '/etc/passwd')):
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, link
        archive.addfile(member)
del zeros
""",
    ),
    Attack(
        "files_of_the_agent", ("readonly_root", "landlock"), judge=_agent_survives, own_kernel=False,
        code=r"""
import glob, sysconfig
targets = ['/opt/sandgate/guest/agent.py', '/opt/sandgate/guest/site/sitecustomize.py', sys.executable, os.__file__, '/bin/bash', '/etc/passwd',
           '/etc/profile', '/etc/ld.so.cache', '/usr/bin/env', *glob.glob('/lib/*/libc.so.6')]
for path in filter(os.path.exists, targets):
    attempt(f'write {path}', lambda: opened(path))
    attempt(f'truncate {path}', lambda: os.truncate(path, 0))
    attempt(f'chmod {path}', lambda: os.chmod(path, 0o777))
    attempt(f'rename {path}', lambda: os.rename(path, path + '.old'))
    attempt(f'unlink {path}', lambda: os.unlink(path))
for folder in ('/', '/etc', '/opt/sandgate/guest', '/usr/bin', '/usr/local/bin', sysconfig.get_path('purelib'), '/etc/profile.d', '/run', '/var',
               '/mnt', '/root', '/home'):
    attempt(f'new in {folder}', lambda: open(f'{folder}/owned', 'w').close())
    attempt(f'unnamed in {folder}', lambda: opened(folder, os.O_TMPFILE | os.O_WRONLY))
    attempt(f'folder in {folder}', lambda: os.mkdir(f'{folder}/owned'))
""",
    ),
    Attack(
        "state_for_the_next_tenant", ("namespaces",), judge=_next_tenant, fresh=True,
        code=r"""
packages = f'/home/user/.local/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages'
owned = sys.owned = True
os.environ['OWNED'] = 'owned'
hook = "import sys, os; sys.owned = True; os.environ['OWNED'] = 'owned'; print('owned')"
home = '/home/user'
shell = 'export OWNED=owned PATH=/home/user/bin:/tmp/bin:$PATH'
files = {f'{home}/.bashrc': shell, f'{home}/.profile': shell, f'{home}/.bash_profile': shell, f'{home}/.profile.d/owned.sh': shell,
         f'{home}/.packages/sitecustomize.py': hook, f'{home}/.packages/usercustomize.py': hook, f'{home}/.packages/numpy.py': hook,
         f'{packages}/usercustomize.py': hook, f'{packages}/owned.pth': 'import sys; sys.owned = True',
         f'{home}/.ipython/profile_default/startup/00.py': hook, f'{home}/sitecustomize.py': hook, f'{home}/numpy.py': hook,
         f'{home}/bin/python3': '#!/bin/sh\necho owned', f'{home}/bin/ls': '#!/bin/sh\necho owned', '/tmp/owned': 'x', '/dev/shm/owned': 'x',
         f'{home}/.config/matplotlib/matplotlibrc': 'backend: owned', f'{home}/.config/pip/pip.conf': '[global]\nindex-url=http://owned'}
for path, text in files.items():
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'w') as file:
        file.write(text)
    os.chmod(path, 0o755)
""",
    ),
    Attack("equal_random_numbers", ("agent",), judge=_twins_differ),
)  # fmt: skip
