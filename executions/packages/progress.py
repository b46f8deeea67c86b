"""How far an installation has come, for whoever waits for it."""

from __future__ import annotations

from collections.abc import Sequence

from executions.packages import index
from executions.packages.decide import Item

NAMED = 3


class Progress:
    """One line, made when it is asked for: `doing`, and of `items` what lies in the store by now.

    The store is looked at, so that it also holds for what another process fetches.
    """

    def __init__(self) -> None:
        self.begin("looking at the policy")

    def begin(self, doing: str, items: Sequence[Item] = ()) -> None:
        self.doing, self.items = doing, tuple(items)

    def __str__(self) -> str:
        if not self.items:
            return self.doing
        missing = [item.name for item in self.items if not index.is_known(item)]
        named = f": {', '.join(missing[:NAMED])}" + (", …" if len(missing) > NAMED else "") if missing else ""
        there, sizes = sum(map(index.bytes_here, self.items)), [item.size_bytes for item in self.items]
        whole = f" of {_mb(sum(s for s in sizes if s))}" if all(sizes) else ""
        return (
            f"{self.doing} {len(self.items) - len(missing)} of {len(self.items)} packages, {_mb(there)}{whole}{named}"
        )


def _mb(size: int) -> str:
    return f"{size / 1_000_000:.1f} MB"
