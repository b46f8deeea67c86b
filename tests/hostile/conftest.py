"""A node of its own for the attacks, and one arena for all of a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from asgiref.sync import async_to_sync

from executions.attacks import Arena
from tests.node import RunningNode, running_node


@pytest.fixture(scope="module")
def node(template_python: Path) -> Iterator[RunningNode]:
    with running_node(template_python) as started:
        yield started


@pytest.fixture(scope="module")
def arena(node: RunningNode) -> Iterator[Arena]:
    entered = Arena(node.backend, secrets_=("for-tests-only-",))
    async_to_sync(entered.__aenter__)()
    yield entered
    async_to_sync(entered.__aexit__)()
