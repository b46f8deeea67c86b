"""What goes wrong at a cloud, and how often: shares between 0 and 1, times in milliseconds or seconds."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, fields
from typing import Any

Z99 = 2.326  # of the normal distribution: 99 % lie below
DOWN = ("", "503", "reset", "swallow")
PLANS: dict[str, dict[str, Any]] = {  # e2b.dev/docs/sandbox/rate-limits, November 2026
    "none": {},
    "hobby": {"creations_per_second": 1, "concurrent": 20, "timeout_max_seconds": 3600},
    "pro": {"creations_per_second": 5, "concurrent": 100},
}


@dataclass
class Faults:
    """How the double behaves from now on. The defaults are a healthy cloud whose creates take what E2B's take."""

    create_ms: list[float] = field(default_factory=lambda: [491, 740])  # p50, p99 (lognormal)
    answer_ms: list[float] = field(default_factory=lambda: [0, 0])  # every other call
    creations_per_second: float = 0  # beyond it 429, as beyond `concurrent`; 0: no limit
    concurrent: int = 0
    timeout_max_seconds: int = 86_400
    vanish: float = 0  # of the sandboxes end without a word, within `vanish_seconds`
    vanish_seconds: float = 2
    refuse: list[dict[str, Any]] = field(default_factory=list)  # {"status", "share", "on"?, "retry_after"?}
    kill_hangs: float = 0  # of the kills are never answered, and kill nothing
    forgets: float = 0  # of the creates are answered with a sandbox that is not there
    loses: float = 0  # of the creates make a sandbox and break the connection off
    cuts: float = 0  # of the streams (code, commands) are cut after their first word
    swallows: float = 0  # of all requests are never answered
    down: str = ""  # "503" from the edge, "reset" connections, or "swallow" everything

    def change(self, asked: Any) -> None:
        """Take over these fields. ValueError, with a sentence, for what is no field or no value of it."""
        if not isinstance(asked, dict):
            raise ValueError("Faults are a JSON object.")
        known = {f.name: type(getattr(self, f.name)) for f in fields(self)}
        for name, value in asked.items():
            if name not in known:
                raise ValueError(f"{name}: there is no such fault; there are {', '.join(known)}.")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number if known[name] in (int, float) else isinstance(value, known[name])):
                raise ValueError(f"{name}: {value!r} is no {known[name].__name__}.")
        if asked.get("down", "") not in DOWN:
            raise ValueError(f"down: one of {', '.join(map(repr, DOWN))}.")
        for name in ("create_ms", "answer_ms"):
            if len(asked.get(name, [0, 0])) != 2:
                raise ValueError(f"{name}: two numbers, p50 and p99.")
        for one in asked.get("refuse", []):
            if not isinstance(one, dict) or not {"status", "share"} <= one.keys():
                raise ValueError("refuse: objects with status and share, and perhaps on and retry_after.")
        for name, value in asked.items():
            setattr(self, name, value)

    def refusal(self, call: str, chance: random.Random) -> dict[str, Any] | None:
        """The refusal that this call meets, if any."""
        for one in self.refuse:
            if one.get("on", call) == call and chance.random() < one["share"]:
                return one
        return None


def seconds(quantiles: list[float], chance: random.Random) -> float:
    """A time drawn from the lognormal distribution with this p50 and p99 (milliseconds)."""
    p50, p99 = quantiles
    if p50 <= 0:
        return 0.0
    sigma = math.log(max(p99, p50) / p50) / Z99
    return p50 / 1000 * math.exp(chance.gauss(0, sigma))
