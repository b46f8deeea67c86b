"""However the product dies, and whatever its E2B gets wrong, both sides soon name the same sandboxes, and no bill is forgotten."""

from __future__ import annotations

import pytest

from tests import servers
from tests.bench.reconcile import WITHIN_SECONDS, rounds
from tests.double import running_double


@pytest.mark.product
@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.long)])
def test_the_doubles_list_and_ours_agree_after_every_kill(times):
    with running_double() as double, servers.folder() as data:
        told = rounds(times, double, data)

    here, there = told.billed
    assert len(told.seconds) == times
    assert max(told.seconds) <= WITHIN_SECONDS
    assert told.found
    assert here >= there > 0
