"""E2B's double as a process of its own: told what to get wrong, asked what it charged."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from executions.backends.e2b import E2BBackend
from tests import servers
from tests.product import HOME, environment

QUICK = {"create_ms": [5, 8]}  # where the time of a boot is not the subject
KEY = "e2b_" + "0d" * 20


@dataclass
class Double:
    """Where it is, and what its owner may ask it that nobody may ask E2B."""

    url: str
    pid: int
    key: str = KEY

    def tell(self, **faults: Any) -> None:
        """Behave like this from now on, beside what was told before."""
        httpx.post(f"{self.url}/_double/faults", json=faults, trust_env=False).raise_for_status()

    def forget(self) -> None:
        """A healthy cloud again, whose creates are quick."""
        httpx.delete(f"{self.url}/_double/faults", trust_env=False).raise_for_status()
        self.tell(**QUICK)

    def vanish(self, sandbox_id: str) -> None:
        httpx.post(f"{self.url}/_double/vanish", json={"sandboxID": sandbox_id}, trust_env=False).raise_for_status()

    def meter(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/_double/meter", trust_env=False, timeout=30).raise_for_status().json()

    def live(self) -> dict[str, dict[str, Any]]:
        """What it has now, by our id where it carries one."""
        told = [one for one in self.meter()["sandboxes"] if one["state"] != "ended"]
        return {one["metadata"].get("sandgate_sandbox", one["sandboxID"]): one for one in told}

    def asked(self, name: str) -> int:
        """How often something was asked for, such as create; or refused, such as `create 429`."""
        return self.meter()["counts"].get(name, 0)

    def settings(self) -> dict[str, str]:
        """The environment of a product whose E2B it is."""
        return {"E2B_API_URL": self.url, "E2B_SANDBOX_URL": self.url, "E2B_API_KEY": self.key}

    def options(self) -> dict[str, Any]:
        """For the SDK's calls."""
        return {"api_url": self.url, "sandbox_url": self.url, "api_key": self.key}

    def backend(self, **options: Any) -> E2BBackend:
        account = {"API_KEY": self.key, "API_URL": self.url, "SANDBOX_URL": self.url}
        return E2BBackend("double", account | options)


@contextmanager
def running_double(*options: str, port: int = 0) -> Iterator[Double]:
    """`manage.py fake_e2b` with these options."""
    with servers.folder() as data:
        command = [sys.executable, "manage.py", "fake_e2b", "--port", port, "--key", KEY, *options]
        said: list[str] = []
        env = environment(data, 1, None) | {"PYTHONUNBUFFERED": "1"}
        with servers.running(command, ready="Ctrl-C ends it", said=said, cwd=HOME, env=env) as process:
            url = next(word for line in said for word in line.split() if word.startswith("http")).rstrip(":")
            yield Double(url, process.pid)
