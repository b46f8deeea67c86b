"""A backend whose walls are thin."""

from executions.backends.scripted import ScriptedBackend


class WeakBackend(ScriptedBackend):
    isolation = "reduced"
