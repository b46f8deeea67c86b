"""Landlock: what guest code may write, and whom it may signal; see landlock(7)."""

from __future__ import annotations

import ctypes
import os
import struct

from . import linux

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture
READ = 0b1101  # execute, read file, read folder
WRITE_FILE, TRUNCATE, IOCTL_DEVICE = 1 << 1, 1 << 14, 1 << 15
RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}  # by ABI
WRITABLE = ("/home/user", "/tmp", "/dev/shm")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/tty", "/dev/pts", "/dev/ptmx")


def abi() -> int:
    """The kernel's Landlock version; 0 where there is none."""
    try:
        return linux.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    except OSError:
        return 0


def ruleset(
    readable: tuple[str, ...] = ("/",), writable: tuple[str, ...] = WRITABLE, devices: tuple[str, ...] = DEVICES
) -> int | None:
    """A ruleset's descriptor, to be enforced in each guest process; None where the kernel has no Landlock."""
    version = abi()
    if not version:
        return None
    handled = RIGHTS[min(version, max(RIGHTS))]
    scoped = 0b11 if version >= 6 else 0  # abstract sockets and signals stay within the guest
    attributes = struct.pack("QQQ", handled, 0, scoped)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = linux.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
    given = [(readable, READ), (writable, handled), (devices, READ | WRITE_FILE | TRUNCATE | IOCTL_DEVICE)]
    for paths, rights in given:
        for path in filter(os.path.exists, paths):
            of_a_file = 0 if os.path.isdir(path) else 0b1000
            _allow(rules, path, rights & handled & ~of_a_file)
    return rules


def _allow(rules: int, path: str, rights: int) -> None:
    parent = os.open(path, os.O_PATH)
    try:
        linux.syscall(ADD_RULE, rules, 1, struct.pack("=Qi", rights, parent), 0)
    finally:
        os.close(parent)


def enforce(rules: int | None) -> None:
    if rules is not None:
        linux.syscall(RESTRICT_SELF, rules, 0)
