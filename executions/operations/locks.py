"""Sandboxes of an agent that has a lock begin with its packages: shown to them on this machine, sent to them elsewhere."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import OrderedDict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from executions import backends
from executions.backends.base import Backend, Handle, SandboxSpec
from executions.errors import BackendError, InstallFailed, SandboxRefused
from executions.hop import rows
from executions.models import Agent, PackageLock, Sandbox
from executions.operations import bases
from executions.operations.placing import once, put
from executions.packages import index, layers, wheels
from executions.packages.decide import Item

REMEMBERED = 200
_known: OrderedDict[str, PackageLock] = OrderedDict()  # they never change
_sets: OrderedDict[tuple[str, str, str], list[str]] = (
    OrderedDict()
)  # (lock, python, machine): hashes of its wheels there


async def create(backend: Backend, sandbox: Sandbox, spec: SandboxSpec) -> Handle:
    """The machine of this row, with the packages of its lock. SandboxRefused where they cannot be had: nothing has run."""
    if not sandbox.lock_id or not backend.capabilities.packages:
        return await backend.create(spec)
    lock = await _lock(sandbox.lock_id)
    if backend.capabilities.layers:
        return await backend.create(replace(spec, layer=await _shown(lock, backend)))
    handle = await backend.create(spec)
    try:
        await _sent(lock, sandbox, handle)
    except BackendError as problem:
        await backend.kill(handle)
        raise SandboxRefused(f"The packages of the agent's lock could not be put into it: {problem.detail}") from None
    except BaseException:
        await backend.kill(handle)
        raise
    return handle


async def _lock(lock_id: str) -> PackageLock:
    if lock_id not in _known:
        _known[lock_id] = await rows(PackageLock.objects.get, pk=lock_id)
        if len(_known) > REMEMBERED:
            _known.popitem(last=False)
    return _known[lock_id]


async def _shown(lock: PackageLock, backend: Any) -> str:
    """The folder of a lock below the backend's layers, made where it is not there."""
    hashes = [pin["sha256"] for pin in lock.pins]
    name, under = layers.digest(hashes), Path(backend.layers)
    if not (under / name).is_dir():
        compiled = lock.python == f"{sys.version_info[0]}.{sys.version_info[1]}"
        try:
            for pin in lock.pins:
                item = _item(pin)
                await once(item.sha256, partial(index.have, item))
            await once(f"layer {under / name}", partial(layers.folder, hashes, under, compiled=compiled))
        except (InstallFailed, OSError) as problem:
            raise SandboxRefused(f"The packages of the agent's lock cannot be had: {problem}") from None
    os.utime(under / name)  # in use: the sweep leaves it
    return name


async def sweep() -> None:
    """Let go of wheels and folders that nothing has asked for in a month."""

    def in_use() -> set[str]:
        locks = PackageLock.objects.filter(pk__in=Agent.objects.exclude(lock=None).values("lock"))
        return {layers.digest(pin["sha256"] for pin in lock.pins) for lock in locks}

    known = [backends.get(alias) for alias in backends.aliases()]
    under = [Path(backend.layers) for backend in known if backend.capabilities.layers]  # type: ignore[attr-defined]
    await asyncio.to_thread(layers.sweep, under, await rows(in_use))


def _item(pin: dict[str, Any]) -> Item:
    return Item(**pin)


async def _sent(lock: PackageLock, sandbox: Sandbox, handle: Handle) -> None:
    """The lock's versions, as wheels for the Python that is there; what the template has already stays as it is."""
    base = await bases.of_sandbox(sandbox, handle)
    wanted = [pin for pin in lock.pins if pin["name"] not in base.present]
    if not wanted:
        return
    key = (lock.pk, base.python, base.machine)
    if key not in _sets:
        _sets[key] = await _wheels(wanted, base)
        if len(_sets) > REMEMBERED:
            _sets.popitem(last=False)
    await put(sandbox, _sets[key], handle)


async def _wheels(wanted: list[dict[str, Any]], base: bases.Base) -> list[str]:
    """The locked wheels where they fit, otherwise the same versions' wheels that do."""
    fits = {pin["name"] for pin in wanted if wheels.fitness(pin["wheel"], base.python, base.machine) is not None}
    items = [_item(pin) for pin in wanted if pin["name"] in fits]
    if others := [f"{pin['name']}=={pin['version']}" for pin in wanted if pin["name"] not in fits]:
        present = {**base.present, **{pin["name"]: pin["version"] for pin in wanted if pin["name"] in fits}}
        look = partial(index.resolved, others, python=base.python, machine=base.machine, present=present)
        items += await once(index.digest_of("resolve", others, base.python, present, None), look)
    for item in items:
        await once(item.sha256, partial(index.have, item))
    return [item.sha256 for item in items]
