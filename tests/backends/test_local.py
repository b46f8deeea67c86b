"""The local runtime keeps the contract of backends, on a real node."""

from __future__ import annotations

import pytest

from tests.backends.contract import BackendContract
from tests.node import RunningNode


class TestLocal(BackendContract):
    @pytest.fixture
    def backend(self, node: RunningNode):
        return node.backend
