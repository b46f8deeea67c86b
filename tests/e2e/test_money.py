"""A thousand callers, a plane that dies, a provider that never confirms a kill: a dollar is a dollar, three are three, and a crowd waits no less."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.product import HOME


@pytest.mark.long
@pytest.mark.product
def test_the_providers_meter_and_the_quota_obey_on_both_engines(template_python):
    command = [sys.executable, "-m", "tests.bench.money", "1", "5", "1"]

    raced = subprocess.run(command, cwd=HOME, capture_output=True, text=True)

    assert raced.returncode == 0, raced.stdout + raced.stderr
    assert raced.stdout.count("never 4") == 2, raced.stdout
    assert raced.stdout.count("apart") == 2, raced.stdout
