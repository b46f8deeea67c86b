"""All that an installation is, in one file."""

from __future__ import annotations

import os
import shlex
import shutil
import sqlite3
import subprocess
import tarfile
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from django.db import connection
from django.utils import timezone

from executions import audit, store
from executions.models import Artifact


class Command(BaseCommand):
    help = "Copy the database, the kept files and the secret key into one file, while the system runs; docs/operations.md restores it."

    def add_arguments(self, parser: Any) -> None:
        parser.add_argument("to", nargs="?", help="a new file, or a folder; none: backups in the data folder")

    def handle(self, *, to: str | None = None, **options: Any) -> None:
        target = _target(Path(to) if to else None)
        if connection.vendor == "postgresql" and not shutil.which("pg_dump"):
            raise CommandError(
                "pg_dump is not on this machine. Where it is, with the password in ~/.pgpass or PGPASSWORD:\n"
                f"  → {shlex.join(pg_dump('sandgate.pgdump'))}\n"
                f"  → tar -czf artifacts.tar.gz -C {shlex.quote(str(Path(settings.ARTIFACTS_DIR).parent))} "
                f"{shlex.quote(Path(settings.ARTIFACTS_DIR).name)}"
            )
        audit.record("backup_made", subject=target.name, reason="by the command line")  # the copy has it, too
        try:
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            kept = _write(target)
        except (OSError, sqlite3.Error) as e:
            raise CommandError(f"{target} was not written: {e}") from None
        self.stdout.write(f"{target}: {target.stat().st_size:,} bytes, {kept:,} kept files.")
        secret = settings.DATA / "secret_key"
        if not secret.exists() or secret.read_text().strip() != settings.SECRET_KEY:
            self.stdout.write(
                "SECRET_KEY is not in it, as it comes from the environment: keys are worth nothing without."
            )


def _target(to: Path | None) -> Path:
    name = f"sandgate-{timezone.now():%Y-%m-%d-%H%M%S}.tar.gz"
    target = settings.DATA / "backups" / name if to is None else to / name if to.is_dir() else to
    if target.exists():
        raise CommandError(f"{target} exists already.")
    return target


def _write(target: Path) -> int:
    """Under another name until it is whole; nobody else may read it. Returns how many kept files are in it."""
    with tempfile.TemporaryDirectory(prefix=".sandgate-", dir=target.parent) as beside:
        part = Path(beside, "part")
        kept = 0
        with store.adding(), os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            # nothing is swept away between the copy of the rows and that of the contents which they name
            with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1, dereference=True) as archive:
                archive.add(_database(Path(beside)), DATABASE[connection.vendor], filter=_ours)
                for name in ("secret_key", "node_name"):  # keys are of the one, local sandboxes of the other
                    if (settings.DATA / name).exists():
                        archive.add(settings.DATA / name, name, filter=_ours)
                for sha256 in Artifact.objects.order_by().values_list("sha256", flat=True).distinct().iterator():
                    content = store.place(sha256)
                    if content.exists():  # else `verify` names it, here and in the copy
                        archive.add(content, f"artifacts/{sha256[:2]}/{sha256}", filter=_ours)
                        kept += 1
            file.flush()
            os.fsync(file.fileno())
        os.link(part, target)  # a rename would replace what has come there meanwhile
    return kept


DATABASE = {"sqlite": "sandgate.sqlite3", "postgresql": "sandgate.pgdump"}


def _database(beside: Path) -> Path:
    """A consistent copy, which writers do not wait for."""
    copy = beside / "database"
    if connection.vendor == "postgresql":
        password = str(connection.settings_dict["PASSWORD"])
        environment = os.environ | ({"PGPASSWORD": password} if password else {})
        dumped = subprocess.run(pg_dump(str(copy)), env=environment, capture_output=True, text=True)
        if dumped.returncode:
            raise OSError(dumped.stderr.strip())
        return copy
    connection.ensure_connection()
    with closing(sqlite3.connect(copy)) as target:
        connection.connection.backup(target)
        ((said,),) = target.execute("PRAGMA quick_check(1)").fetchall()
    if said != "ok":
        raise sqlite3.DatabaseError(said)
    return copy


def pg_dump(to: str) -> list[str]:
    """The command, without the password."""
    named = connection.settings_dict
    where = {"host": named["HOST"], "port": named["PORT"], "username": named["USER"]}
    options = [f"--{name}={value}" for name, value in where.items() if value]
    return ["pg_dump", "--format=custom", "--no-owner", f"--file={to}", *options, str(named["NAME"])]


def _ours(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.mode, member.uid, member.gid, member.uname, member.gname = 0o600, 0, 0, "", ""
    return member
