"""The official TypeScript client, once through everything; its lock lies in typescript/."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.mcp_door.test_servers import installed, served  # noqa: F401
from tests.product import HOME

HERE = Path(__file__).parent / "typescript"


@pytest.fixture(scope="module")
def program() -> Path:
    """client.mjs beside its packages, which are installed once per lock and kept."""
    if not shutil.which("npm") or not shutil.which("node"):
        pytest.skip("npm and node are not installed: apt-get install -y npm")
    lock = hashlib.sha256((HERE / "package-lock.json").read_bytes()).hexdigest()[:12]
    kept = HOME / "var" / "npm" / f"mcp-{lock}"
    if not (kept / "node_modules").is_dir():
        fresh = kept.with_name(f"{kept.name}-{os.getpid()}")
        shutil.copytree(HERE, fresh, dirs_exist_ok=True)
        argv = ["npm", "ci", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline"]
        done = subprocess.run(argv, cwd=fresh, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(fresh)
            pytest.skip(f"npm cannot install the client: {done.stderr[-300:]}")
        shutil.rmtree(kept, ignore_errors=True)
        fresh.rename(kept)
    return Path(shutil.copy(HERE / "client.mjs", kept / "client.mjs"))


@pytest.mark.parametrize("served", ["uvicorn"], indirect=True)
def test_the_typescript_client_gets_what_the_python_client_gets(served, program):  # noqa: F811
    url, token = served

    done = subprocess.run(["node", program, url, token], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    saw = json.loads(done.stdout)
    assert saw["tools"][:2] == ["execute_code", "run_script"]
    assert saw["schemas"]
    assert saw["first"].startswith("hello\nvalue: 1\n")
    assert saw["count"] == 2
    assert saw["refused"] == [True, "invalid"]
    assert saw["progress"][0].endswith(": hello")
    assert saw["whole"] == 20_001
    assert saw["listed"]
    assert saw["ended"] == "gone"
