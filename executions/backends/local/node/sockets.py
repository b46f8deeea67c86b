"""What the sockets of one network namespace keep in memory, as the kernel says it: sock_diag(7).

A socket is asked that the sandbox has made before any guest code ran; it keeps its namespace wherever it is held.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path

SOCK_DIAG_BY_FAMILY, DUMP, DONE, ERROR = 20, 0x301, 3, 2
HEADER, ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=HH")
UNIX, INET, INET6, NETLINK = 1, 2, 10, 16
SHOW_UNIX_MEMORY, SHOW_INET_MEMORY, SHOW_NETLINK_MEMORY = 0x20, 1 << 6, 1
KINDS = (  # request, length of what stands before an answer's attributes, the number of the attribute
    (struct.pack("=BBHIIIII", UNIX, 0, 0, 0xFFFFFFFF, 0, SHOW_UNIX_MEMORY, 0xFFFFFFFF, 0xFFFFFFFF), 16, 5),
    *((struct.pack("=BBBBI48x", family, protocol, SHOW_INET_MEMORY, 0, 0xFFFFFFFF), 72, 7)
      for family in (INET, INET6) for protocol in (socket.IPPROTO_TCP, socket.IPPROTO_UDP)),
    (struct.pack("=BBHIIII", NETLINK, 0xFF, 0, 0, SHOW_NETLINK_MEMORY, 0xFFFFFFFF, 0xFFFFFFFF), 28, 1),
)  # fmt: skip
FIRST, FIGURES = struct.Struct("=IH"), struct.Struct("=I4xI4xIIII")  # of sk_meminfo all but the sizes of buffers


def most_bytes() -> int:
    """What one socket of default size keeps at most: full, with one more message, and options."""
    default = max(int(Path(f"/proc/sys/net/core/{way}mem_default").read_text()) for way in "rw")
    return 2 * default + (128 << 10)


def how_many(pid: int) -> int:
    """All sockets of the namespace of this process, also those that are on their way between two processes."""
    with open(f"/proc/{pid}/net/sockstat") as file:
        return int(file.readline().split()[2])


def held_bytes(diag: socket.socket) -> int:
    """What all of them keep now. OSError where the kernel does not say."""
    return sum(_asked(diag, *kind) for kind in KINDS)


def _asked(diag: socket.socket, request: bytes, before: int, wanted: int) -> int:
    diag.send(HEADER.pack(HEADER.size + len(request), SOCK_DIAG_BY_FAMILY, DUMP, 1, 0) + request)
    total, attributes = 0, HEADER.size + before
    while True:
        data, place = diag.recv(1 << 18), 0
        while place < len(data):
            length, kind = FIRST.unpack_from(data, place)
            if kind == DONE:
                return total
            if kind == ERROR:
                raise OSError(
                    -struct.unpack_from("=i", data, HEADER.size)[0], "the kernel tells nothing of its sockets"
                )
            attribute, end = place + attributes, place + length
            while attribute < end:
                size, number = ATTRIBUTE.unpack_from(data, attribute)
                if number == wanted:
                    total += sum(FIGURES.unpack_from(data, attribute + ATTRIBUTE.size))
                    break
                attribute += (size + 3) & ~3
            place += (length + 3) & ~3
