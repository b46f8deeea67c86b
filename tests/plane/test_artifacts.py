"""What is kept when a sandbox ends: which files, how much, once, and said in one sentence."""

import asyncio
import errno
import os
from datetime import timedelta

import pytest
from django.utils import timezone

from executions import globs, keys, operations, quotas, store
from executions.backends import scripted
from executions.backends.base import FileInfo
from executions.errors import FileRefused, NotFound, SandboxLost, SessionGone
from executions.hop import rows
from executions.models import Artifact, Quota, Sandbox
from executions.operations import artifacts
from executions.states import EndReason, ExecutionState, SandboxState, Unit, Window
from tests.plane.conftest import asks
from tests.plane.test_sessions import idle, machine, opened, paused

pytestmark = pytest.mark.django_db
S = SandboxState
HOME = "/home/user"


@pytest.fixture(autouse=True)
def shelf(settings, tmp_path):
    settings.ARTIFACTS_DIR = str(tmp_path / "artifacts")
    return tmp_path / "artifacts"


@pytest.fixture
def hostile(monkeypatch):
    """Files of a guest's that are not what they say: name → (size that is said, pieces, or an error)."""
    files: dict[str, tuple] = {}

    async def list_files(self, handle, path, *, depth=1):
        if path == HOME:
            return [FileInfo("outputs", f"{HOME}/outputs", "directory")]
        return [FileInfo(n, f"{path}/{n}", f[2] if len(f) > 2 else "file", f[0]) for n, f in files.items()]

    async def read_file(self, handle, path):
        for piece in files[path.rsplit("/", 1)[1]][1]:
            if isinstance(piece, BaseException):
                raise piece
            if piece is None:
                await asyncio.Event().wait()
            yield piece

    monkeypatch.setattr(scripted.ScriptedBackend, "list_files", list_files)
    monkeypatch.setattr(scripted.ScriptedBackend, "read_file", read_file)
    return files


async def ended(caller, files: dict[str, bytes] | None = None, **fields) -> Sandbox:
    sandbox = await opened(caller, **fields)
    for path, content in (files or {}).items():
        await operations.put_file(caller=caller, session_id=sandbox.pk, path=path, data=content)
    return await operations.end_session(caller=caller, session_id=sandbox.pk)


async def names() -> list[str]:
    return [name async for name in Artifact.objects.order_by("name").values_list("name", flat=True)]


async def test_a_session_keeps_its_outputs_and_its_end_says_so(caller):
    files = {"outputs/a.csv": b"1,2\n", "outputs/deep/er/b.png": b"png", "other.txt": b"no"}
    sandbox = await ended(caller, files)

    assert await names() == ["outputs/a.csv", "outputs/deep/er/b.png"]
    assert (sandbox.state, sandbox.kept_said) == (S.GONE, "2 files kept (7 bytes).")
    kept = await Artifact.objects.aget(name="outputs/a.csv")
    assert (kept.mime, kept.size_bytes, b"".join(store.pieces(kept.sha256))) == ("text/csv", 4, b"1,2\n")
    assert timedelta(days=29) < kept.expires_at - timezone.now() <= timedelta(days=30)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*.csv"], ["a.csv"]),
        (["**/*.csv"], ["a.csv", "out/b.csv", "out/x/c.csv"]),
        (["out/*.csv"], ["out/b.csv"]),
        (["o*"], ["out/b.csv", "out/x/c.csv", "out/x/d.txt"]),
        (["out/x/d.txt", "a.csv", "a.csv", "missing", "nothing/*"], ["a.csv", "out/x/d.txt"]),
        (["/tmp/*.log"], ["tmp/t.log"]),
        (["**"], ["a.csv", "out/b.csv", "out/x/c.csv", "out/x/d.txt"]),
        ([], []),
    ],
)
async def test_which_files_a_pattern_means(caller, patterns, expected):
    paths = ("a.csv", "out/b.csv", "out/x/c.csv", "out/x/d.txt", "/tmp/t.log")
    await ended(caller, dict.fromkeys(paths, b"x"), keep_files=patterns)

    assert await names() == expected


@pytest.mark.parametrize("pattern", ["", "../x", "a/../../b", "x" * 201, "a\nb", "/", "~/"])
def test_what_is_no_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match="is"):
        globs.normalised([pattern])


async def test_a_run_keeps_what_it_asks_for_and_nothing_otherwise(caller):
    files = {"out.txt": "aGk=", "big/x.bin": "AAAA"}
    plain = await operations.execute(caller=caller, request=asks(files=files))
    shape = await operations.execute(caller=caller, request=asks(files=files, keep_files=["*.txt"]))
    failed = await operations.execute(caller=caller, request=asks("#! E: x", files=files, keep_files=["big"]))

    assert (plain.kept, shape.kept, failed.kept) == ("", "1 file kept (2 bytes).", "1 file kept (3 bytes).")
    assert [a.name async for a in Artifact.objects.filter(execution=shape.id)] == ["out.txt"]
    assert (await Sandbox.objects.aget(executions=shape.id)).state == S.GONE


async def test_the_agents_setting_holds_for_its_runs_and_sessions(caller):
    caller.agent.keep_files, caller.agent.artifact_days = ["*.txt"], 2
    await caller.agent.asave()
    files = {"out.txt": "aGk="}

    shape = await operations.execute(caller=caller, request=asks(files=files))
    await ended(caller, {"s.txt": b"x", "outputs/no": b"x"})

    assert shape.kept == "1 file kept (2 bytes)."
    assert await names() == ["out.txt", "s.txt"]
    assert (await Artifact.objects.afirst()).expires_at < timezone.now() + timedelta(days=3)


async def test_the_same_content_lies_in_the_store_once(caller, shelf):
    await ended(caller, {"outputs/a": b"same", "outputs/b": b"same"})
    await ended(caller, {"outputs/c": b"same"})

    assert len(list(shelf.glob("??/*"))) == 1
    assert not list(shelf.glob("incoming/*"))
    assert await Artifact.objects.acount() == 3


async def test_a_quota_of_stored_bytes_leaves_out_what_does_not_fit_and_has_room_again_when_files_are_let_go_of(caller):
    quota = await rows(Quota.objects.create, team=caller.team, unit=Unit.BYTES_STORED, limit=10)

    sandbox = await ended(caller, {f"{HOME}/outputs/a": b"12345678", f"{HOME}/outputs/b": b"1234"})

    assert "1 file kept (8 bytes); 1 left out: " in sandbox.kept_said
    assert "is at 8 of 10 bytes stored" in sandbox.kept_said
    await rows(Artifact.objects.update, expires_at=timezone.now())
    assert await rows(quotas.in_use, quota) == 0


@pytest.mark.parametrize("end", [EndReason.IDLE, EndReason.EXPIRED])
async def test_files_are_kept_at_an_idle_end_and_at_the_absolute_one(caller, end):
    sandbox = await opened(caller, pause_after_seconds=0)
    await operations.put_file(caller=caller, session_id=sandbox.pk, path="outputs/a", data=b"x")
    past = timezone.now() - timedelta(hours=1 if end == EndReason.IDLE else 0)
    await Sandbox.objects.aupdate(**{"last_used_at" if end == EndReason.IDLE else "leased_until": past})

    await operations.reap()

    await sandbox.arefresh_from_db()
    assert (sandbox.state, sandbox.end_reason) == (S.GONE, end)
    assert await names() == ["outputs/a"]
    with pytest.raises(SessionGone) as gone:
        await operations.execute(caller=caller, request=asks(session_id=sandbox.pk))
    kept = await Artifact.objects.aget()
    assert gone.value.facts["artifacts"] == [{"id": kept.pk, "name": "outputs/a", "size_bytes": 1}]
    assert kept.pk in gone.value.detail
    assert f'files={{"outputs/a": {{"artifact": "{kept.pk}"}}}}' in gone.value.remedy
    assert ("idle 10 min" if end == EndReason.IDLE else "its time was over") in gone.value.detail


async def test_a_paused_session_is_woken_up_once_more_for_its_files_and_paid_for(caller):
    budget = await Quota.objects.acreate(team=caller.team, unit=Unit.NANO_USD, window=Window.DAY, limit=10**12)
    sandbox = await opened(caller)
    await operations.put_file(caller=caller, session_id=sandbox.pk, path="outputs/a", data=b"x")
    await operations.pause_session(caller=caller, session_id=sandbox.pk)

    await operations.end_session(caller=caller, session_id=sandbox.pk)

    assert await names() == ["outputs/a"]
    await budget.arefresh_from_db()
    await sandbox.arefresh_from_db()
    assert (sandbox.state, budget.reserved) == (S.GONE, 0)
    assert not machine(sandbox).alive


async def test_a_paused_session_that_the_budget_cannot_wake_up_ends_without_its_files(caller):
    budget = await Quota.objects.acreate(team=caller.team, unit=Unit.NANO_USD, window=Window.DAY, limit=10**12)
    sandbox = await paused(caller)
    await Quota.objects.aupdate(limit=sandbox.spent_nano_usd)

    await operations.end_session(caller=caller, session_id=sandbox.pk)

    await sandbox.arefresh_from_db()
    await budget.arefresh_from_db()
    assert (sandbox.state, budget.reserved) == (S.GONE, 0)
    assert sandbox.kept_said == "Nothing was kept; the budget does not cover waking it up."


@pytest.mark.parametrize("reason", [EndReason.LOST, EndReason.OUTAGE, EndReason.KILLED])
async def test_nothing_is_kept_of_what_is_dead_or_killed_and_the_row_says_so(caller, reason):
    sandbox = await opened(caller)
    await operations.put_file(caller=caller, session_id=sandbox.pk, path="outputs/a", data=b"x")

    await operations.retire(sandbox, reason)

    await sandbox.arefresh_from_db()
    assert (sandbox.state, await names()) == (S.GONE, [])
    assert sandbox.kept_said in ("Nothing was kept: the sandbox had died.", "Nothing was kept: it was killed.")


async def test_a_machine_that_has_expired_at_the_provider_says_that_nothing_was_kept(caller):
    sandbox = await opened(caller)
    machine(sandbox).end("expired")

    await operations.end_session(caller=caller, session_id=sandbox.pk)

    await sandbox.arefresh_from_db()
    assert sandbox.kept_said == "Nothing was kept; the sandbox died meanwhile."


# Crash seams


async def test_a_process_that_dies_between_keeping_and_killing_leaves_the_kill_to_the_next_round(caller, monkeypatch):
    sandbox = await opened(caller)
    await operations.put_file(caller=caller, session_id=sandbox.pk, path="outputs/a", data=b"x")
    await rows(operations.reap.__globals__["begin_retiring"], sandbox, EndReason.IDLE)
    assert await artifacts.keep_at_end(sandbox, EndReason.IDLE)

    await operations.reap()

    await sandbox.arefresh_from_db()
    assert (sandbox.state, sandbox.kept_said) == (S.GONE, "1 file kept (1 byte).")
    assert await Artifact.objects.acount() == 1


async def test_a_process_that_dies_in_the_middle_of_keeping_has_its_work_finished_not_repeated(caller):
    sandbox = await opened(caller)
    for name in "abc":
        await operations.put_file(caller=caller, session_id=sandbox.pk, path=f"outputs/{name}", data=name.encode())
    await rows(operations.reap.__globals__["begin_retiring"], sandbox, EndReason.IDLE)
    assert await rows(artifacts._take_turn, sandbox)
    tally = artifacts.Tally()
    info = FileInfo("a", f"{HOME}/outputs/a", "file", 1)
    await artifacts._keep_one(sandbox, None, "outputs/a", info, tally)

    assert not await operations.retire(sandbox, EndReason.IDLE)  # it may still be at it
    await operations.reap()
    assert (await Sandbox.objects.aget()).state == S.RETIRING
    await Sandbox.objects.aupdate(turning_until=timezone.now() - timedelta(seconds=1))
    await operations.reap()

    sandbox = await Sandbox.objects.aget()
    assert (sandbox.state, sandbox.kept_said) == (S.GONE, "3 files kept (3 bytes).")
    assert await names() == ["outputs/a", "outputs/b", "outputs/c"]


async def test_a_full_disk_ends_the_session_all_the_same(caller, monkeypatch, shelf):
    def full(self, piece):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.Incoming, "write", full)

    sandbox = await ended(caller, {"outputs/a": b"x"})

    assert (sandbox.state, await names()) == (S.GONE, [])
    assert sandbox.kept_said == "Nothing was kept; the disk of this installation is full."
    assert not list(shelf.glob("incoming/*"))


async def test_a_full_store_keeps_no_more(caller, settings):
    settings.ARTIFACTS_TOTAL_BYTES = 5
    first = await ended(caller, {"outputs/a": b"12345"})
    second = await ended(caller, {"outputs/b": b"6"})

    assert first.kept_said == "1 file kept (5 bytes)."
    assert second.kept_said == "Nothing was kept; the store of this installation is full."


# Hostile files


async def test_a_file_that_says_it_is_huge_is_not_even_read(caller, hostile):
    hostile["sparse"] = (1 << 50, [AssertionError("read")])
    hostile["small"] = (1, [b"x"])

    sandbox = await ended(caller)

    assert sandbox.kept_said == "1 file kept (1 byte); 1 left out: too large."


async def test_a_file_that_grows_while_it_is_read_is_cut_off_at_the_limit(caller, hostile, settings, shelf):
    settings.ARTIFACTS_MAX_BYTES = 1000
    hostile["endless"] = (1, [b"x" * 100] * 50)

    sandbox = await ended(caller)

    assert sandbox.kept_said == "Nothing was kept; 1 left out: too large."
    assert not list(shelf.glob("incoming/*"))


async def test_fifos_devices_links_and_what_vanishes_are_left_out(caller, hostile):
    hostile["link"] = (0, [AssertionError("read")], "symlink")
    hostile["fifo"] = (0, [FileRefused("is not a regular file")])
    hostile["gone"] = (0, [FileRefused(missing=True)])

    sandbox = await ended(caller)

    assert sandbox.kept_said == "Nothing was kept; 2 left out: cannot be read."


async def test_a_file_that_never_comes_to_its_end_holds_the_end_up_for_a_bounded_time(caller, hostile, monkeypatch):
    monkeypatch.setattr(artifacts, "READ_SECONDS", 0.05)
    hostile["stuck"] = (1, [b"x", None])

    sandbox = await ended(caller)

    assert (sandbox.state, sandbox.kept_said) == (S.GONE, "Nothing was kept; a file did not come to its end.")


async def test_a_million_files_are_kept_up_to_the_limit(caller, hostile, settings):
    settings.ARTIFACTS_MAX_FILES = 5
    for n in range(1000):
        hostile[f"{n:04}"] = (1, [b"x"])

    sandbox = await ended(caller)

    assert (sandbox.kept_said, await Artifact.objects.acount()) == ("5 files kept (5 bytes); more than 5 files.", 5)


async def test_folders_without_end_are_walked_for_a_bounded_way(caller, monkeypatch):
    async def list_files(self, handle, path, *, depth=1):
        return [FileInfo(n, f"{path}/{n}", "directory") for n in ("outputs", "b")]

    monkeypatch.setattr(scripted.ScriptedBackend, "list_files", list_files)

    sandbox = await ended(caller)

    assert sandbox.kept_said == "Nothing was kept; more than 500 folders."


async def test_names_that_are_no_text_or_more_than_a_line_break_nothing(caller, hostile):
    for name in ("new\nline", "half\ud800", 'quo"te\\', "‮gnp.exe", "x" * 600):
        hostile[name] = (1, [b"x"])

    sandbox = await ended(caller)

    assert sandbox.kept_said == "4 files kept (4 bytes); 1 left out: its path is too long."
    with pytest.raises(SessionGone) as gone:
        await operations.execute(caller=caller, request=asks(session_id=sandbox.pk))
    assert "\n" not in gone.value.remedy


async def test_a_sandbox_that_dies_while_its_files_are_read_keeps_what_came_before(caller, hostile):
    hostile["a"] = (1, [b"x"])
    hostile["b"] = (1, [b"y", SandboxLost()])

    sandbox = await ended(caller)

    assert sandbox.kept_said == "1 file kept (1 byte); the sandbox died meanwhile."


# Let go


async def test_what_is_over_is_forgotten_and_content_goes_with_its_last_row(caller, shelf):
    await ended(caller, {"outputs/a": b"shared", "outputs/b": b"own"})
    await ended(caller, {"outputs/c": b"shared"})
    over = Artifact.objects.filter(name__in=["outputs/a", "outputs/b"])
    await over.aupdate(expires_at=timezone.now() - timedelta(seconds=1))
    gone = await over.afirst()
    with pytest.raises(NotFound):
        await rows(operations.find_artifact, caller, gone.pk)

    assert await artifacts.prune() == 1

    assert await names() == ["outputs/c"]
    assert len(list(shelf.glob("??/*"))) == 1
    assert await artifacts.prune() == 0


async def test_what_a_dead_process_left_half_way_is_removed_after_an_hour_and_not_before(shelf):
    fresh, old = store.Incoming(), store.Incoming()
    os.utime(old._file.name, (0, 0))

    await artifacts.prune()

    assert [p.name for p in shelf.glob("incoming/*")] == [os.path.basename(fresh._file.name)]
    fresh.close()
    old.close()


def test_nothing_is_swept_away_between_a_content_and_its_row(shelf):
    incoming = store.Incoming()
    incoming.write(b"x")
    rows_now: set[str] = set()
    with store.adding():  # as a backup does, for as long as it reads
        incoming.settle()
        meanwhile = store.sweep(lambda _: rows_now)
    assert (meanwhile, store.place(incoming.sha256).exists()) == (0, True)

    assert store.sweep(lambda _: rows_now) == 1
    assert not store.place(incoming.sha256).exists()
    incoming.close()


async def test_artifacts_of_a_run_in_a_session_are_listed_with_the_sessions_own(caller):
    sandbox = await opened(caller)
    run = asks(session_id=sandbox.pk, files={"r.txt": "YQ=="}, keep_files=["r.txt"])
    shape = await operations.execute(caller=caller, request=run)
    assert shape.state == ExecutionState.SUCCEEDED
    await operations.put_file(caller=caller, session_id=sandbox.pk, path="outputs/s", data=b"x")
    await operations.end_session(caller=caller, session_id=sandbox.pk)

    listed = await rows(lambda: operations.artifacts_of(caller, session=sandbox))

    assert [a.name for a in listed] == ["outputs/s", "r.txt"]


async def test_a_sessions_files_are_not_read_while_code_of_a_later_call_may_change_them(caller):
    sandbox = await opened(caller)
    await idle(sandbox, 3000)
    await rows(operations.reap.__globals__["begin_retiring"], sandbox, EndReason.IDLE)

    with pytest.raises(SessionGone, match="is ending"):
        await operations.execute(caller=caller, request=asks(session_id=sandbox.pk))


async def test_a_later_run_takes_a_kept_file_by_reference_and_nobody_elses(caller, eve_key):
    await ended(caller, {"outputs/a.csv": b"1,2\n"})
    kept = await Artifact.objects.aget()
    run = asks(files={"in/b.csv": {"artifact": kept.pk}}, keep_files=["in"])

    shape = await operations.execute(caller=caller, request=run)

    assert shape.kept == "1 file kept (4 bytes)."
    assert await Artifact.objects.filter(sha256=kept.sha256).acount() == 2
    eve = await rows(keys.authenticate, eve_key)
    eve.agent.route = ["first"]
    with pytest.raises(NotFound):
        await operations.execute(caller=eve, request=run)


async def test_a_reference_whose_content_is_gone_by_the_time_it_is_needed_fails_the_run_by_name(caller, settings):
    await ended(caller, {"outputs/a.csv": b"1,2\n"})
    kept = await Artifact.objects.aget()
    execution = await rows(operations.submit, caller=caller, request=asks(files={"b": {"artifact": kept.pk}}))
    store.place(kept.sha256).unlink()

    run = operations.start(execution)
    await run.task

    assert (execution.state, execution.error_code) == (ExecutionState.FAILED, "file_not_found")
