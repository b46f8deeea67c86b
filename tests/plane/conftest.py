"""What the tests of the plane share: scripted machines under names, callers, submissions."""

from __future__ import annotations

import pytest

from executions import backends, keys
from executions.models import Agent, Template
from executions.operations import setup
from executions.serializers import Submission, parse
from executions.states import Scope

SCRIPTED = "executions.backends.scripted.ScriptedBackend"


@pytest.fixture(autouse=True)
def scripted(request, settings):
    """Three simulated backends; tests give them manners with `behave`."""
    settings.SANDBOXES = {alias: {"BACKEND": SCRIPTED, "OPTIONS": {}} for alias in ("first", "second", "third")}
    yield
    backends._live.clear()


@pytest.fixture
def behave(settings):
    def tell(alias: str, **options):
        settings.SANDBOXES = {**settings.SANDBOXES, alias: {"BACKEND": SCRIPTED, "OPTIONS": options}}
        return backends.get(alias)

    return tell


@pytest.fixture
def seeded(db):
    setup.seed()
    return Template.objects.get(name="default")


@pytest.fixture
def caller(agent: Agent, seeded) -> keys.Caller:
    key, _ = keys.make_key(team=agent.team, agent=agent, name="of the tests", scopes=list(Scope.values))
    agent.route = ["first", "second"]
    agent.save()
    return keys.Caller(team=agent.team, agent=agent, key=key, scopes=frozenset(Scope.values), door="rest")


def asks(code: str = "#= 1", **fields) -> Submission:
    return parse(Submission, {"code": code, **fields})
