"""docs/integrations: each example as it stands, in an environment of its own, with a scripted model and the real server."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from executions.backends.local import environment
from executions.errors import BackendUnavailable
from tests.e2e.test_examples import blocks, shell  # noqa: F401
from tests.product import HOME, Product

EXAMPLES = HOME / "docs" / "integrations"
SCRIPTED = HOME / "tests" / "e2e" / "scripted"
PAGE = "docs/integrations/README.md"


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_an_agent_keeps_a_session_mends_its_error_and_answers(product: Product, shell, name):  # noqa: F811
    """The packages are fetched once per lock and kept below var/."""
    try:
        python = environment.make(HOME / "var" / "integrations", EXAMPLES / f"{name}.txt")
    except BackendUnavailable as problem:
        pytest.skip(f"The packages of {name} cannot be fetched: {problem.detail[-300:]}")

    said = asked(python, name, shell)

    value, session = said.split(" in ")
    with product.http() as http:
        runs = http.get("/api/v1/executions", params={"session": session}).json()["results"]
        ended = http.get(f"/api/v1/sessions/{session}").json()
    assert value == "42"
    assert [(run["code"], run["state"]) for run in reversed(runs)] == [
        ("x = 6", "succeeded"),
        ("x * y", "failed"),
        ("y = 7; x * y", "succeeded"),
    ]
    assert ended["state"] == "gone"


def asked(python: Path, name: str, shell: dict[str, str]) -> str:  # noqa: F811
    program = f"import asyncio, {name}, {name}_model as scripted; print(asyncio.run({name}.ask(scripted.MODEL, 'Six times?')))"
    names = {
        **shell,
        "PYTHONPATH": os.pathsep.join(map(str, (EXAMPLES, SCRIPTED))),
        "OPENAI_AGENTS_DISABLE_TRACING": "1",
    }
    done = subprocess.run([python, "-c", program], env=names, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_pages_curl_labels_a_step_and_reads_its_workflow(shell):  # noqa: F811
    (curl,) = blocks("sh", PAGE)

    said = subprocess.run(["bash", "-ec", curl], env=shell, capture_output=True, text=True, timeout=60)

    ran, workflow = (json.loads(line) for line in said.stdout.splitlines())
    assert (ran["workflow"], ran["step"], ran["user"]) == ("report-42", "sum", "customer-17"), said.stderr
    assert workflow["states"] == {"succeeded": 1}


def test_the_page_names_every_example_and_no_other():
    page = (HOME / PAGE).read_text()

    assert {path.name for path in EXAMPLES.glob("*.*")} == {
        "README.md",
        *(f"{path.stem}{end}" for path in EXAMPLES.glob("*.py") for end in (".py", ".txt")),
    }
    assert [path.name for path in EXAMPLES.glob("*.py") if f"]({path.name})" not in page] == []
