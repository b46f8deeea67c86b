"""Stands in for a zygote to try whether this machine lets sandboxes be made: the same walls, nothing imported."""

from __future__ import annotations

import json
import os
import signal
import socket

from . import linux, walls

CONTROL = 3


def main() -> None:
    control = socket.socket(fileno=CONTROL)
    control.send(json.dumps({"ready": {}}).encode())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 1)
        if not message:
            os._exit(0)
        try:
            pid = linux.fork_into(walls.INNER)
        except OSError as problem:
            socket.socket(fileno=descriptors.pop()).send(str(problem).encode())
            continue
        if pid == 0:
            node = socket.socket(fileno=descriptors[0])
            try:
                walls.begin(json.loads(message), node)
                node.send(b"waiting")
                node.recv(1)
            except BaseException as problem:
                node.send(str(problem).encode()[:2000])
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
