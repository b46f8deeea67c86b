"""One node for all tests of a worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node import RunningNode, running_node


@pytest.fixture(scope="session")
def node(template_python: Path) -> Iterator[RunningNode]:
    with running_node(template_python) as started:
        yield started
