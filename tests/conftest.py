"""What every test may ask for: databases, servers, the real product, a browser, the cast."""

from __future__ import annotations

import inspect
import math
import os
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from asgiref.sync import async_to_sync
from django.db import connections

from tests import servers
from tests.double import Double, running_double
from tests.product import Product, running_product


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Coroutine tests run on the test's own thread's loop, so that fixtures' rows are visible to them."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    wanted = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    async_to_sync(pyfuncitem.obj)(**wanted)
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a server, a browser or the database says so by what it asks for."""
    for item in items:
        asked = getattr(item, "fixturenames", ())
        if item.get_closest_marker("django_db") or {"db", "transactional_db"} & set(asked):
            item.add_marker("database")
        for fixture, marker in (("product", "product"), ("template_python", "runtime"), ("browser", "browser")):
            if fixture in asked:
                item.add_marker(marker)


@pytest.fixture(autouse=True)
def hop(request: pytest.FixtureRequest) -> None:
    """Inside one transaction the hop stays on this thread; transaction=True tests hop as the product does."""
    from django.conf import settings

    marker = request.node.get_closest_marker("django_db")
    real = bool(marker and (marker.kwargs.get("transaction") or marker.args[:1] == (True,)))
    settings.HOP_INLINE = not (real or "transactional_db" in request.fixturenames)


@pytest.fixture
def index(settings, tmp_path):
    """An index of the test's own, from which the product takes packages; what it fetches goes with the test."""
    from tests.index import running_index

    with running_index() as served:
        settings.PACKAGE_INDEX = f"{served.url}/simple"
        settings.DATA = tmp_path
        yield served


@pytest.fixture(autouse=True)
def breaker_forgets() -> None:
    """The rows that a process has seen go with the test's transaction."""
    from executions import breaker

    breaker._seen = (-math.inf, {})
    breaker._made.clear()


@pytest.fixture(autouse=True)
def clock_is_new() -> None:
    """A test before may have set it, which is no jump here."""
    import_module("executions.operations.reap")._clock = None


@pytest.fixture(autouse=True, scope="session")
def hop_ends() -> Iterator[None]:
    yield
    from executions import hop

    hop.close()


@pytest.fixture(scope="session")
def django_db_setup(django_db_setup: None, django_db_blocker) -> Iterator[None]:
    """The threads of the hop and the pool let go of the test database before it is dropped."""
    with django_db_blocker.unblock():
        guard_lifted()
    yield
    from executions import hop

    hop.close()
    for connection in connections.all():
        connection.close()
        if hasattr(connection, "close_pool"):
            connection.close_pool()


def guard_lifted() -> None:
    """The database refuses to empty the audit, which is how tests with transactions of their own clean up."""
    from django.db import connection

    from executions import audit

    assert audit.triggers() >= audit.TRIGGERS
    migration = import_module("executions.migrations._audit_guard")
    with connection.cursor() as cursor:
        for statement in migration.UNGUARD[connection.vendor]:
            cursor.execute(statement)


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    with servers.redis() as url:
        yield url


@pytest.fixture(scope="session")
def template_python() -> Path:
    """The interpreter of the default template's environment, made once per checkout and reused by every run."""
    from executions.backends.local import environment

    if named := os.environ.get("SANDGATE_TEMPLATE_PYTHON"):
        return Path(named)
    return environment.make(Path(__file__).parent.parent / "var" / "templates")


@pytest.fixture(scope="session")
def product(template_python: Path) -> Iterator[Product]:
    """The real product as its users start it, with a data folder of its own; one for all tests of a worker."""
    with running_product(template_python) as started:
        yield started


@pytest.fixture(scope="session")
def double_process() -> Iterator[Double]:
    with running_double() as started:
        yield started


@pytest.fixture
def double(double_process: Double) -> Double:
    """E2B's double, a process of its own; healthy and quick until the test tells it otherwise."""
    double_process.forget()
    return double_process


@pytest.fixture(scope="session")
def chromium() -> str:
    path = shutil.which("chromium")
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("chromium is missing, and CI does not skip the browser tests: apt-get install -y chromium")
        pytest.skip("chromium is not installed: apt-get install -y chromium")
    return path


@pytest.fixture(scope="module")
def browser(chromium: str):
    """Debian's chromium under playwright; a page comes from browser.new_page().

    Of one module, as playwright keeps an event loop on this thread, where coroutine tests need one of their own.
    """
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield started
        started.close()


# The cast: Ada owns it, Bob may look, Eve is of another team and gets a 404.


@pytest.fixture
def team(db):
    from executions.models import Team

    return Team.objects.create(name="Engines")


@pytest.fixture
def ada(team):
    return member(team, "ada", "owner")


@pytest.fixture
def bob(team):
    return member(team, "bob", "viewer")


@pytest.fixture
def eve(db):
    from executions.models import Team

    return member(Team.objects.create(name="Elsewhere"), "eve", "owner")


@pytest.fixture
def agent(team):
    from executions.models import Agent

    return Agent.objects.create(team=team, name="etl", isolation_floor="none")


@pytest.fixture
def key(agent) -> str:
    """A token of Ada's agent, with every scope."""
    return token_for(agent)


@pytest.fixture
def eve_key(eve) -> str:
    """A token of another team's agent, with every scope there."""
    from executions.models import Agent

    return token_for(Agent.objects.create(team=eve.memberships.get().team, name="spy", isolation_floor="none"))


def member(team, name: str, role: str):
    from executions.models import Membership, User

    user = User.objects.create_user(name, f"{name}@example.org", "correct horse")
    Membership.objects.create(team=team, user=user, role=role)
    return user


def token_for(agent) -> str:
    from executions import keys
    from executions.states import Scope

    return keys.make_key(team=agent.team, agent=agent, name="for tests", scopes=Scope.values)[1]
