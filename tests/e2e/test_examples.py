"""What the README tells people to type works when it is typed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests.product import HOME, Product


def blocks(language: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (HOME / page).read_text(), re.M | re.S)


@pytest.fixture
def shell(product: Product) -> dict[str, str]:
    """The variables that the first screen tells people to export."""
    return {
        "PATH": os.environ["PATH"],
        "SANDGATE_URL": product.url,
        "SANDGATE_API_KEY": product.key,
        "E2B_API_URL": f"{product.url}/e2b",
        "E2B_SANDBOX_URL": f"{product.url}/e2b",
        "E2B_API_KEY": product.key.replace("sg_", "e2b_"),
        "no_proxy": "127.0.0.1",
    }


def test_the_readmes_curl_runs_code(shell):
    (curl,) = blocks("sh")

    said = subprocess.run(["bash", "-ec", curl], env=shell, capture_output=True, text=True, timeout=60)

    answer = json.loads(said.stdout)
    assert (answer["state"], answer["logs"]["stdout"]) == ("succeeded", "3\n"), said.stderr


def test_the_readmes_e2b_program_runs_unchanged(shell):
    (program,) = blocks("python")

    said = subprocess.run([sys.executable, "-c", program], env=shell, capture_output=True, text=True, timeout=60)

    assert said.stdout == "2\n", said.stderr


def test_the_readmes_mcp_configuration_is_json_of_the_form_that_clients_read(product):
    (entry,) = re.findall(r'`(\{"mcpServers":.*?\})`', (HOME / "README.md").read_text(), re.S)

    server = json.loads(entry.replace("\n", " "))["mcpServers"]["sandgate"]
    assert server["url"].endswith("/mcp")
    assert server["headers"]["Authorization"].startswith("Bearer sg_")


def test_every_page_that_the_readme_names_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", (HOME / "README.md").read_text()):
        assert (HOME / target).exists(), target
