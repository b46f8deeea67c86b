"""The preloaded parent of one template: imports and warms once, then forks a sandbox at each request of the node.

It never runs user code. It must have one thread whenever it forks.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import time
import traceback

from . import agent, languages, linux, nursery, python_context, reduced, seccomp, walls

CONTROL = 3
REHEARSALS = 12  # Python adapts code to its use during the first eight calls: better here than in each fork's own copy


def main() -> None:
    control = socket.socket(fileno=CONTROL)
    try:
        began = time.monotonic()
        facts = python_context.warm() | {"languages": languages.look(), "absent": languages.absent}
        _rehearse()
        for counted in (True, False):
            seccomp.program(counted=counted)  # in the reduced mode a stricter one is there already
        gc.collect()
        gc.freeze()  # forks share these pages as long as nobody counts references in them
        if len(os.listdir("/proc/self/task")) != 1:
            raise RuntimeError("a package of the template started a thread while it was imported")
        facts["warm_ms"] = round((time.monotonic() - began) * 1000)
    except BaseException:
        control.send(json.dumps({"broken": traceback.format_exc(limit=-3)[-2000:]}).encode())
        sys.exit(1)
    control.send(json.dumps({"ready": facts}).encode())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # pid 1 here: the kernel reaps
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 1)
        if not message:
            os._exit(0)  # the node is gone; every sandbox goes with this process
        try:
            pid = linux.fork_into(walls.INNER) if not json.loads(message).get("reduced") else os.fork()
        except OSError as problem:
            socket.socket(fileno=descriptors.pop()).send(str(problem).encode())
            continue
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            control.close()
            _become_sandbox(json.loads(message), socket.socket(fileno=descriptors[0]))
        for descriptor in descriptors:
            os.close(descriptor)


def _rehearse() -> None:
    for _ in range(REHEARSALS):
        python_context.rehearse()
        if os.getpid() == 1:  # or there is no network namespace of ours, and others could connect
            agent.rehearse()


def _become_sandbox(plan: dict, node: socket.socket) -> None:
    program = seccomp.program(counted=plan["counted"])
    try:
        (reduced.begin if plan.get("reduced") else walls.begin)(plan, node)
        # it would have a Landlock domain beside the agent's, who could not signal it: the reduced mode starts without one
        nursling = None
        if not plan.get("reduced"):
            nursling = nursery.Nursling(program, plan["rehearse"])
            if plan["rehearse"]:
                agent.rehearse()
        node.send(b"waiting")
        message, listeners, _, _ = socket.recv_fds(node, 1 << 20, 2)
        if not message:
            os._exit(0)  # the node does not need this one any more
        plan |= json.loads(message)
        if plan["proxy_port"]:  # it listens in this network namespace and is served from outside
            with socket.create_server(("127.0.0.1", plan["proxy_port"]), backlog=128) as listener:
                socket.send_fds(node, [b"proxy"], [listener.fileno()])
        waiting = {nursling.fileno()} if nursling is not None else set()
        walls.enclose(plan, {node.fileno(), *waiting, *listeners}, program)
    except BaseException:
        node.send(traceback.format_exc(limit=-2)[-2000:].encode())
        os._exit(1)
    try:
        agent.main(plan, node, nursling, *listeners)
    finally:
        os._exit(1)
