"""A small load generator: keep-alive HTTP/1.1 over asyncio streams, so that the client is never what is measured."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Figures:
    """What a run showed: requests a second, and milliseconds at the median and the 95th percentile."""

    rate: float
    p50_ms: float
    p95_ms: float
    failed: int

    def __str__(self) -> str:
        return f"{self.rate:7.0f}/s  p50 {self.p50_ms:7.2f} ms  p95 {self.p95_ms:7.2f} ms  failed {self.failed}"


def percentile(sorted_values: list[float], share: float) -> float:
    return sorted_values[min(len(sorted_values) - 1, int(len(sorted_values) * share))]


def request(method: str, path: str, *, key: str = "", body: bytes = b"", host: str = "127.0.0.1") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
    if key:
        head += f"Authorization: Bearer {key}\r\n"
    return head.encode() + b"\r\n" + body


async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, raw: bytes) -> tuple[int, bytes]:
    """Send one request, read its answer: (status, body)."""
    writer.write(raw)
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head[9:12])
    lower = head.lower()
    if b"transfer-encoding: chunked" in lower:
        body = b""
        while size := int((await reader.readline()).split(b";")[0], 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    else:
        at = lower.find(b"content-length: ")
        length = int(lower[at + 16 : lower.find(b"\r\n", at)]) if at >= 0 else 0
        body = await reader.readexactly(length)
    return status, body


async def drive(port: int, raw: bytes, *, clients: int, seconds: float, good: tuple[int, ...] = (200, 201)) -> Figures:
    """`clients` connections, each sending as soon as it has its answer."""
    taken: list[float] = []
    failed = 0
    end = time.perf_counter() + seconds

    async def client() -> None:
        nonlocal failed
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=16 * 1024 * 1024)
        try:
            while (began := time.perf_counter()) < end:
                status, _ = await one(reader, writer, raw)
                taken.append(time.perf_counter() - began)
                failed += status not in good
        finally:
            writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    spent = time.perf_counter() - began
    taken.sort()
    return Figures(len(taken) / spent, percentile(taken, 0.5) * 1000, percentile(taken, 0.95) * 1000, failed)
