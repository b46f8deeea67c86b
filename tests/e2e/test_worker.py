"""Web processes that uvicorn has started, and the background work beside them: what waits is started by the worker."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import httpx

from tests import servers
from tests.product import HOME, environment

PREPARE = """
import django; django.setup()
from django.core.management import call_command
call_command("migrate", verbosity=0)
from executions import operations
from executions.models import Agent, Quota
first = operations.first_start()
Agent.objects.update(route=["scripted"], isolation_floor="none")
Quota.objects.filter(unit="concurrent_executions").update(limit=1, when_exhausted="wait")
print(first.token)
"""


def test_what_waits_is_started_by_a_worker_and_the_worker_ends_well(tmp_path):
    port = servers.free_port()
    env = environment(tmp_path, port, None, SANDGATE_SCRIPTED="1", DJANGO_SETTINGS_MODULE="config.settings")
    token = subprocess.run(
        [sys.executable, "-c", PREPARE], cwd=HOME, env=env, check=True, capture_output=True, text=True
    ).stdout.split()[-1]
    web = [sys.executable, "-m", "uvicorn", "config.asgi:application", "--host", "127.0.0.1", "--port", str(port)]
    with (
        servers.running(web, ready="Uvicorn running", cwd=HOME, env=env),
        httpx.Client(
            base_url=f"http://127.0.0.1:{port}/api/v1", headers={"Authorization": f"Bearer {token}"}, timeout=60
        ) as http,
    ):
        long = {"code": "#~ 3\n#= 1"}
        first = http.post("/executions", json=long, headers={"Prefer": "respond-async"}).json()
        second = http.post("/executions", json={"code": "#= 2"}, headers={"Prefer": "respond-async"}).json()
        assert (second["state"], second["queue"]["position"]) == ("queued", 1), json.dumps(second)
        assert "1 of 1 concurrent executions" in second["queue"]["reason"]

        worker = subprocess.Popen(
            [sys.executable, "manage.py", "worker"], cwd=HOME, env=env, preexec_fn=servers.die_with_parent
        )
        try:
            done = http.get(f"/executions/{second['id']}", headers={"Prefer": "wait=30"}).json()
            while done["state"] in ("queued", "starting", "running"):
                done = http.get(f"/executions/{second['id']}", headers={"Prefer": "wait=30"}).json()
            assert done["state"] == "succeeded", done
            assert http.get(f"/executions/{first['id']}").json()["state"] == "succeeded"
        finally:
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(15) == 0
