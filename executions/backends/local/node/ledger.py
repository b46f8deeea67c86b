"""What a sandbox asked of the network, and what became of it; bounded, however often it asks."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime


@dataclass(frozen=True)
class Limits:
    """Of one sandbox. A record is one line of its ledger; what it was refused is counted, so that it floods nothing."""

    connections: int = 64
    waiting: int = 256  # with those that have not said yet what they want
    bytes: int = 16 << 30
    records: int = 4096
    refusals: int = 256
    header_bytes: int = 16 * 1024
    header_seconds: float = 10
    connect_seconds: float = 10
    idle_seconds: float = 300


@dataclass
class Record:
    """One connection, or one refusal and how often it was repeated. Bytes out are the sandbox's."""

    host: str
    port: int
    verdict: str = "denied"  # allowed, denied, failed
    reason: str = ""
    address: str = ""
    bytes_out: int = 0
    bytes_in: int = 0
    times: int = 1
    number: int = 0
    at: str = ""


class Ledger:
    """What one sandbox asked for, numbered as it ended."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.open: list[Record] = []
        self.ended: list[Record] = []
        self._refused: dict[tuple[str, int, str], Record] = {}
        self._number = 0

    @property
    def full(self) -> bool:
        return len(self.open) + len(self.ended) >= self.limits.records

    def begin(self, host: str, port: int, address: str) -> Record:
        record = Record(host, port, "allowed", address=address, at=_now())
        self.open.append(record)
        return record

    def end(self, record: Record) -> None:
        self.open.remove(record)
        self._append(record)

    def note(self, host: str, port: int, verdict: str, reason: str) -> None:
        """Something that was not connected; the same again is counted."""
        key = (host, port, reason)
        if key not in self._refused and len(self._refused) >= self.limits.refusals:
            host, port, reason = "", 0, "and others"
            key = (host, port, reason)
        if known := self._refused.get(key):
            known.times += 1
            return
        self._refused[key] = record = Record(host[:255], port, verdict, reason[:300], at=_now())
        self._append(record)

    def _append(self, record: Record) -> None:
        self._number += 1
        record.number = self._number
        self.ended.append(record)

    def take(self, after: int, most: int) -> tuple[list[Record], bool]:
        """Ended records behind number `after`, and whether there are more; those up to it have been stored and go."""
        self.ended = [record for record in self.ended if record.number > after]
        self._refused.clear()  # what was told does not change any more
        return self.ended[:most], len(self.ended) > most


def _now() -> str:
    return datetime.now(UTC).isoformat()
