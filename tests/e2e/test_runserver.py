"""A Django developer finds what they expect: migrate, runserver, and it works."""

from __future__ import annotations

import re
import subprocess
import sys

import httpx

from tests import servers
from tests.product import HOME, environment


def test_migrate_and_runserver_give_the_working_product(template_python):
    port = servers.free_port()
    with servers.folder() as data:
        env = environment(data, port, template_python, PYTHONUNBUFFERED="1")
        subprocess.run([sys.executable, "manage.py", "migrate", "-v", "0"], cwd=HOME, env=env, check=True, timeout=60)
        said: list[str] = []
        command = [sys.executable, "manage.py", "runserver", "--noreload", f"127.0.0.1:{port}"]

        with servers.running(command, ready="Quit the server", said=said, cwd=HOME, env=env):
            key = re.search(r"^export SANDGATE_API_KEY=(\S+)$", "".join(said), re.M).group(1)
            patient = httpx.HTTPTransport(retries=5)  # of connecting: it says so a moment before it listens
            with httpx.Client(transport=patient, timeout=60) as http:
                answer = http.post(
                    f"http://127.0.0.1:{port}/api/v1/executions",
                    json={"code": "1+1"},
                    headers={"Authorization": f"Bearer {key}"},
                )

    assert answer.status_code == 201
    assert answer.json()["state"] == "succeeded"
