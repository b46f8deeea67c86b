"""Taking more memory and more of the processors than one was given, also where no meter looks."""

from __future__ import annotations

from executions.attacks.arena import Arena, Attack, Ran, Through
from executions.backends.base import Handle

MIB = 1 << 20
ALLOWED_MIB, BEYOND_MIB = 256, 128  # of memory; what may be passed before who passes it is dead
ENDED = ("value", "MemoryError", "PermissionError", "OutOfMemory", "ContextRestarting", "lost", "timeout")


async def _memory_is_held(arena: Arena, handle: Handle, ran: Ran) -> str:
    peak = ran.usage.get("peak_memory_bytes", 0) // MIB
    if peak > ALLOWED_MIB + BEYOND_MIB:
        raise Through(f"{peak} MiB were used where {ALLOWED_MIB} were allowed")
    return f"ended as {ran.end}" + (f" at {peak} MiB of {ALLOWED_MIB}" if peak else "")


async def _children_are_held(arena: Arena, handle: Handle, ran: Ran) -> str:
    """By their own account: a meter may look too late."""
    if ran.end != "value":
        return await _memory_is_held(arena, handle, ran)
    touched = await arena.value(handle, "peak")
    if touched > ALLOWED_MIB + BEYOND_MIB:
        raise Through(f"{touched} MiB were touched at once where {ALLOWED_MIB} were allowed")
    return f"{touched} MiB of {ALLOWED_MIB} were touched at once; " + await _memory_is_held(arena, handle, ran)


async def _cpu_is_held(arena: Arena, handle: Handle, ran: Ran) -> str:
    cpus = ran.usage.get("cpu_us", 0) / 1e6 / max(ran.seconds, 0.1)
    if cpus > 1.3:
        raise Through(f"{cpus:.1f} processors were used where 1 was allowed")
    return f"{cpus:.1f} processors of 1"


_ALONE = r"""
import mmap, struct
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
libc.munmap.argtypes = ctypes.c_void_p, ctypes.c_size_t
libc.vmsplice.restype = ctypes.c_ssize_t
libc.vmsplice.argtypes = ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_uint
libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
def mapped(size, flags, protection=mmap.PROT_READ | mmap.PROT_WRITE, file=-1):
    address = libc.mmap(None, size, protection, flags, file, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return address
def touched(address, size, step=4096):
    for place in range(address, address + size, step):
        ctypes.c_char.from_address(place).value
def alone(way):
    # in a child, so that its death is the end of this way only; whether it held what it wanted, for a second
    if (pid := os.fork()) == 0:
        try:
            way()
            time.sleep(1)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0
"""

ATTACKS = (
    Attack(
        "memory_bomb", ("cgroups", "rlimits"), limits={"memory_mib": ALLOWED_MIB}, judge=_memory_is_held, ends=ENDED,
        code=r"""
held = []
while len(held) < 256:
    held.append(bytearray(b'x' * (8 << 20)))
through['2 GiB'] = 'touched'
""",
    ),
    Attack(
        "memory_bomb_in_children", ("cgroups", "rlimits"), limits={"memory_mib": ALLOWED_MIB}, judge=_children_are_held, ends=ENDED,
        code=r"""
import mmap
with open('/tmp/touched', 'w+b') as file:
    file.truncate(16)
    account = mmap.mmap(file.fileno(), 16)
block = b'x' * (1 << 20)
def eat(number):
    os.nice(19)  # so that the parent sees it
    held = mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for size in range(1, 65):
        held.write(block)
        account[number] = size
    time.sleep(1.5)
time.sleep(0.3)  # as one that has nothing to do
alive, statuses, peak = {}, [], 0
for number in range(16):
    if (pid := os.fork()) == 0:
        try:
            eat(number)
            os._exit(0)
        finally:
            os._exit(1)
    alive[pid] = number
while alive:
    peak = max(peak, sum(account[number] for number in alive.values()))
    time.sleep(0.001)
    for pid in list(alive):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            statuses.append(status)
            del alive[pid]
attempt('1 GiB in 16 processes', lambda: not any(statuses))
""",
    ),
    Attack(
        "memory_bomb_shared", ("cgroups", "rlimits"), limits={"memory_mib": ALLOWED_MIB}, judge=_memory_is_held, ends=ENDED,
        code=r"""
import mmap
block = b'x' * (1 << 20)
held = []
for _ in range(24):
    held.append(mmap.mmap(-1, 64 << 20))
    for _ in range(64):
        held[-1].write(block)
    time.sleep(0.02)
through['1.5 GiB of shared mappings'] = 'touched'
""",
    ),
    Attack(
        "memory_that_nobody_maps", ("cgroups", "seccomp"), limits={"memory_mib": ALLOWED_MIB}, judge=_memory_is_held, ends=ENDED, suicide=True,
        code=_ALONE + r"""
def behind_one_page(file=-1, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS):
    for _ in range(24):
        address = mapped(32 << 20, flags, mmap.PROT_READ, file)
        touched(address, 32 << 20)
        libc.munmap(address + 4096, (32 << 20) - 4096)
def in_pipes():
    held_kib = 0
    for _ in range(24):
        read, write = os.pipe()
        address = mapped(32 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        libc.madvise(address, 32 << 20, 14)
        for place in range(address, address + (32 << 20), 2 << 20):
            ctypes.memset(place, 1, 1)
            checked(libc.vmsplice(write, struct.pack('PN', place, 1), 1, 0))
        with open('/proc/self/smaps_rollup') as file:
            held_kib += next(int(line.split()[1]) for line in file if line.startswith('AnonHugePages'))
        libc.munmap(address, 32 << 20)
    if held_kib < 400 << 10:
        raise MemoryError
zero = os.open('/dev/zero', os.O_RDWR if os.access('/dev/zero', os.W_OK) else os.O_RDONLY)
attempt('shared memory, unmapped but one page', lambda: alone(behind_one_page))
attempt('the same of /dev/zero', lambda: alone(lambda: behind_one_page(zero, mmap.MAP_SHARED)))
attempt('huge pages behind single bytes in pipes', lambda: alone(in_pipes))
""",
    ),
    Attack(
        "memory_bomb_in_the_kernel", ("cgroups", "rlimits"), limits={"memory_mib": ALLOWED_MIB}, judge=_memory_is_held, ends=ENDED, suicide=True,
        code=_ALONE + r"""
def page_tables():  # of zeros that are shared by all: a table of 4 KiB for each 2 MiB
    touched(mapped(192 << 30, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_NORESERVE, mmap.PROT_READ), 192 << 30, 2 << 20)
attempt('page tables', lambda: alone(page_tables))
def sockets(make, size):
    total, held = 0, []
    try:
        while len(held) < 450 and total < 100 << 20:
            pair = make()
            for end in pair:
                end.setblocking(False)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
                try:
                    while True:
                        total += end.send(b'x' * size)
                except BlockingIOError:
                    pass
            held.append(pair)
    except OSError:
        pass
    return total, held
def connected():
    with socket.create_server(('127.0.0.1', 0)) as server:
        one = socket.create_connection(server.getsockname())
        return one, server.accept()[0]
def in_children(make, size):
    totals, children = [], []
    for _ in range(4):
        read, write = os.pipe()
        if (pid := os.fork()) == 0:
            total, held = sockets(make, size)
            os.write(write, b'%d' % total)
            time.sleep(2)
            os._exit(0)
        os.close(write)
        totals.append(read)
        children.append(pid)
    total = sum(int(os.read(read, 20) or b'0') for read in totals)
    time.sleep(0.3)
    alive = sum(os.waitpid(pid, os.WNOHANG)[0] == 0 for pid in children)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    return total > 300 << 20 and alive == 4 and total
attempt('unread bytes of pairs', lambda: in_children(socket.socketpair, 32768))
attempt('unread bytes of connections', lambda: in_children(connected, 65536))
""",
    ),
    Attack(
        "cpu_beyond_its_share", ("cgroups", "seccomp"), seconds=15, judge=_cpu_is_held, fresh=True,
        code=r'''
spin = """
import os, time
try:
    os.sched_setaffinity(0, range(64))
except OSError:
    pass
end = time.monotonic() + 2
while time.monotonic() < end: pass
print(time.process_time())
"""
workers = [subprocess.Popen([sys.executable, '-Sc', spin], stdout=subprocess.PIPE) for _ in range(4)]
took = sum(float(worker.communicate()[0]) for worker in workers)
attempt('more than one processor', lambda: took > 2.6 and took)
''',
    ),
)  # fmt: skip
