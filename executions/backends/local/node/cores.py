"""Which processors a sandbox may use, where no control group shares them out: as many as it was given, the least taken ones."""

from __future__ import annotations

import os
from collections import Counter


class Cores:
    def __init__(self) -> None:
        self._taken = Counter(dict.fromkeys(sorted(os.sched_getaffinity(0)), 0))

    def take(self, count: int) -> list[int]:
        """Their numbers; none where it may use all of them."""
        if count >= len(self._taken):
            return []
        chosen = sorted(self._taken, key=lambda core: self._taken[core])[:count]
        self._taken.update(chosen)
        return chosen

    def give_back(self, chosen: list[int]) -> None:
        self._taken.subtract(chosen)
