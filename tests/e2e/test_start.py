"""A newcomer starts Sandgate, uses it, ends it, and starts it again."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import servers
from tests.product import HOME, Product, all_end, descendants, environment, start


@pytest.fixture
def data():
    with servers.folder() as path:
        yield path


@pytest.fixture
def started(data, template_python):
    product = start(data, servers.free_port(), template_python)
    yield product
    servers.end(product.process)


def run_code(product: Product, code: str) -> dict:
    with product.http() as http:
        answer = http.post("/api/v1/executions", json={"code": code})
    assert answer.status_code == 201, answer.text
    return answer.json()


def refused(data: Path, port: int, *before: str, **more: str) -> str:
    """What a start that cannot go on says; one sentence and a remedy, never a traceback."""
    ended = subprocess.run(
        [*before, sys.executable, "manage.py", "serve"],
        cwd=HOME,
        env=environment(data, port, Path(sys.executable), **more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode in (1, 2)
    assert "Traceback" not in ended.stderr
    return ended.stderr


def test_the_first_screen_is_all_that_a_newcomer_needs_to_run_code(product):
    execution = run_code(product, "1+1")

    assert execution["state"] == "succeeded"
    assert execution["results"][0]["text/plain"] == "2"


def test_the_curl_on_the_first_screen_runs_as_it_stands(product):
    screen = "".join(product.screen)
    exports = [line for line in screen.splitlines() if line.startswith("export SANDGATE_")]
    curl = screen[screen.index("curl ") :].split("\n\n")[0]

    ran = subprocess.run(["bash", "-c", "\n".join([*exports, curl])], capture_output=True, text=True, timeout=60)

    assert '"succeeded"' in ran.stdout.replace(" ", "").replace('"state":', ""), ran.stdout + ran.stderr


def test_a_signal_ends_everything_within_five_seconds_and_leaves_nothing(started, data):
    run_code(started, "1+1")
    children = descendants(started.process.pid)
    mounts = Path("/proc/self/mountinfo").read_text()
    began = time.monotonic()

    started.process.send_signal(signal.SIGTERM)

    assert started.process.wait(10) == 0
    assert time.monotonic() - began < 5
    assert children
    assert all_end(children, 1)
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert [path for path in data.rglob("*") if path.is_socket()] == []
    assert list(Path("/sys/fs/cgroup").glob(f"**/*sandgate*{started.process.pid}*")) == []


def test_ctrl_c_ends_it_while_a_stream_is_open(started):
    with started.http() as http:
        begun = http.post(
            "/api/v1/executions", json={"code": "import time; time.sleep(60)"}, headers={"Prefer": "respond-async"}
        ).json()
        with http.stream("GET", f"/api/v1/executions/{begun['id']}/events") as stream:
            assert stream.status_code == 200

            started.process.send_signal(signal.SIGINT)

            assert started.process.wait(8) == 0


def test_nothing_lives_on_when_it_is_killed(started):
    run_code(started, "1+1")
    children = descendants(started.process.pid)

    started.process.kill()

    assert children
    assert all_end(children, 5)


def test_a_second_start_is_quick_shows_no_secret_and_changes_nothing(started, data, template_python):
    servers.end(started.process)
    before = rows(data)
    began = time.monotonic()

    again = start(data, servers.free_port(), template_python)

    try:
        with again.http() as http:
            assert http.get("/healthz").status_code == 200
        assert time.monotonic() - began < 30  # alone about 3 s: nothing is made anew; here other tests share the cores
        assert started.key not in "".join(again.screen)
        assert "sg_" not in "".join(again.screen)
    finally:
        servers.end(again.process)
    assert rows(data) == before


def test_a_taken_port_is_one_sentence_and_another_port(data):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port := servers.free_port()))
        taken.listen()

        said = refused(data, port)

    assert f"Port {port}" in said
    assert "PORT=" in said


def test_mistakes_in_the_settings_are_told_together(data):
    said = refused(
        data, 0, PORT="http", SANDGATE_HOP_THREADS="many", DATABASE_URL="mysql://a@b/c", SECRET_KEY_FILE="/nowhere"
    )

    assert [line.split(":")[0] for line in said.splitlines()[1:]] == [
        "SECRET_KEY_FILE",
        "PORT",
        "SANDGATE_HOP_THREADS",
        "DATABASE_URL",
    ]


def test_a_data_folder_that_cannot_be_written_is_one_sentence():
    said = refused(Path("/proc/sandgate"), servers.free_port())

    assert "/proc/sandgate cannot be written" in said
    assert "SANDGATE_DATA" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="making a small disk needs root")
def test_a_full_disk_is_one_sentence(data):
    small = ("unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size=256k tmpfs {data} && exec "$@"', "-")

    said = refused(data, servers.free_port(), *small)

    assert "disk is full" in said
    assert "df -h" in said


def test_a_database_of_a_newer_release_is_left_alone(started, data):
    servers.end(started.process)
    with sqlite3.connect(data / "sandgate.sqlite3") as database:
        database.execute(
            "INSERT INTO django_migrations (app, name, applied) VALUES ('executions', '9999_later', '2030-01-01')"
        )
    database.close()

    said = refused(data, servers.free_port())

    assert "newer release" in said


def test_a_database_that_cannot_be_reached_is_one_sentence(data):
    said = refused(data, servers.free_port(), DATABASE_URL="postgresql://nobody@127.0.0.1:1/none")

    assert "cannot be used" in said
    assert "DATABASE_URL" in said


def test_doctor_says_what_is_there_and_what_to_type_for_what_is_not(data):
    examined = subprocess.run(
        [sys.executable, "manage.py", "doctor"],
        cwd=HOME,
        env=environment(data, 8000, None),
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert examined.stderr == ""
    assert "Python" in examined.stdout
    assert "export E2B_API_KEY=" in examined.stdout


def rows(data: Path) -> dict[str, int]:
    """How many rows each table has, those aside that any running server writes."""
    database = sqlite3.connect(data / "sandgate.sqlite3")
    try:
        found = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        tables = [name for (name,) in found if name not in ("executions_metrictotal", "executions_backendstate")]
        return {name: database.execute(f'SELECT COUNT(*) FROM "{name}"').fetchone()[0] for name in tables}
    finally:
        database.close()
