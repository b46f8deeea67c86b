"""Where sandboxes come from: `settings.SANDBOXES = {alias: {"BACKEND": dotted path, "OPTIONS": {…}}}`."""

from __future__ import annotations

from django.conf import settings
from django.utils.module_loading import import_string

from executions.backends.base import Backend

BUILT_IN = {  # for keys that are bound to it: never part of a route by itself, and never listed
    "scripted": {"BACKEND": "executions.backends.scripted.ScriptedBackend", "OPTIONS": {}}
}
_live: dict[str, tuple[dict, Backend]] = {}


def get(alias: str) -> Backend:
    """The backend of this alias, one per process, made anew when its settings change. KeyError where there is none."""
    configured = configuration(alias)
    held = _live.get(alias)
    if held is None or held[0] != configured:
        backend = import_string(configured["BACKEND"])(alias, dict(configured.get("OPTIONS", {})))
        held = _live[alias] = (configured, backend)
    return held[1]


def configuration(alias: str) -> dict:
    """KeyError where there is none."""
    return settings.SANDBOXES[alias] if alias in settings.SANDBOXES else BUILT_IN[alias]


def is_known(alias: str) -> bool:
    return alias in settings.SANDBOXES or alias in BUILT_IN


def aliases() -> list[str]:
    """In the order of the default route."""
    return list(settings.SANDBOXES)


async def close_all() -> None:
    while _live:
        _, (_, backend) = _live.popitem()
        await backend.close()
