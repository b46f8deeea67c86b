"""One node for all tests of a worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node import RunningNode, running_node

SHORT = "prints state_is_kept exception killed_sandbox_is_lost files_go command_streams kill_is_confirmed timeout_ends too_long".split()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each sandbox of the example boots a Python of its own: beyond these its contract is for `make soak`."""
    for item in items:
        if "TestBubblewrap" in item.nodeid and not any(part in item.name for part in SHORT):
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def node(template_python: Path) -> Iterator[RunningNode]:
    with running_node(template_python) as started:
        yield started
