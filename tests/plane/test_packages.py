"""What may be installed: names, policies and wheels of strangers, without any sandbox; the index is the test's own."""

from __future__ import annotations

import asyncio
import io
import json
import stat
import struct
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from executions import operations, packages
from executions.backends.base import Event
from executions.backends.scripted import ScriptedBackend
from executions.errors import ApprovalPending, InstallFailed, Invalid, PackageDenied
from executions.hop import rows
from executions.models import Advisory, Agent, Approval, AuditEvent, Package, PackagePolicy, Refusal
from executions.operations import approvals, bases
from executions.packages import advisories, index, layers, names, wheels
from executions.packages.decide import Item
from executions.serializers import SessionRequest
from tests.index import Index, made, running_index

BASE = bases.Base("3.11", "x86_64", {"numpy": "2.0.0"})
HOSTILE = [
    "x; touch /p", "--index-url http://127.0.0.1:9/simple x", "git+file:///etc/passwd", "x @ file:///etc/passwd", "-r /etc/passwd", "../x",
    "x; python_version > '3'", "https://127.0.0.1/x.whl", "$(touch /p)", "x\n-e .", "", "x==1; rm", "x===1", "./x.whl", "x[a;b]", "x >= ",
]  # fmt: skip


@pytest.fixture
def served(settings, tmp_path, monkeypatch) -> Iterator[Index]:
    with running_index() as found:
        settings.PACKAGE_INDEX = f"{found.url}/simple"
        settings.PACKAGE_INDEX_PRIVATE = ""
        settings.DATA = tmp_path
        monkeypatch.setattr(bases, "of_template", lambda template: BASE)
        yield found


@pytest.fixture
def free(caller) -> Agent:
    """Ada's agent, which may install anything that no policy forbids."""
    caller.agent.packages = ["*"]
    caller.agent.save()
    return caller.agent


_started: list[str] = []
_watching = threading.Event()
_hooked: list[bool] = []


@contextmanager
def processes_seen() -> Iterator[list[str]]:
    """Every process that this one starts meanwhile, as the interpreter itself reports it."""
    if not _hooked:  # such a hook can never be taken out
        sys.addaudithook(
            lambda event, args: (
                _watching.is_set()
                and event in ("subprocess.Popen", "os.posix_spawn", "os.fork", "os.exec", "os.system")
                and _started.append(event)
            )
        )
        _hooked.append(True)
    _started.clear()
    _watching.set()
    try:
        yield _started
    finally:
        _watching.clear()


@pytest.mark.parametrize("requirement", HOSTILE)
@pytest.mark.django_db(transaction=True)
async def test_x_touch_p_and_index_url_and_git_file_are_refused_before_any_process_starts(
    requirement, caller, free, served
):
    with processes_seen() as started:
        with pytest.raises(Invalid) as refused:
            await operations.install_for_agent(caller=caller, requirements=["fine", requirement])

    assert refused.value.facts["field"] == "packages"
    assert (started, dict(served.served)) == ([], {})


async def install(caller, *requirements: str):
    return await operations.install_for_agent(caller=caller, requirements=list(requirements))


@pytest.mark.django_db(transaction=True)
async def test_what_a_policy_denies_by_name_is_refused_before_any_process_starts_and_is_kept(caller, served):
    with (
        processes_seen() as started,
        pytest.raises(PackageDenied, match="Agent etl may not install left; allowed are: none"),
    ):
        await install(caller, "left")

    assert (started, dict(served.served)) == ([], {})
    row = await Package.objects.aget()
    assert (row.name, row.verdict) == ("left", "denied")
    assert (await Refusal.objects.aget()).code == "package_denied"


POLICIES = [
    ({"allow": []}, "The policy of team Engines does not allow acme; allowed are: none."),
    ({"allow": ["acme>=3"]}, "does not allow acme 2.0; allowed are: acme>=3."),
    ({"deny": ["acme"]}, "The policy of team Engines denies acme."),
    ({"deny": ["acme<3"]}, "The policy of team Engines denies acme<3."),
    ({"deny": ["part"]}, "The policy of team Engines denies part."),
    ({"licences": ["MIT"]}, "acme 2.0 is under GPL-3.0-only; the policy of team Engines allows MIT."),
    ({"most_bytes": 10}, "bytes; the policy of team Engines allows 10."),
    ({"least_age_days": 365}, "team Engines waits 365 days."),
    ({"private": ["acme"]}, "acme may come from the private index only, and that does not have it."),
    ({}, "acme 2.0 has the known vulnerability OSV-1 (advisories of 2026-11-01)."),
]


@pytest.mark.parametrize(("rules", "sentence"), POLICIES)
@pytest.mark.django_db(transaction=True)
async def test_each_rule_of_a_policy_denies_with_one_sentence_and_nothing_is_installed(
    rules, sentence, caller, free, served, tmp_path
):
    served.add("acme", "2.0", requires=("part",), licence="GPL-3.0-only")
    served.add("part", "1.0", licence="GPL-3.0-only")
    if rules:
        await PackagePolicy.objects.acreate(team=caller.team, **rules)
    else:
        write_advisory(tmp_path / "osv.json", "OSV-1", "acme", introduced="0", fixed="3.0")
        await asyncio.to_thread(advisories.take, tmp_path / "osv.json")

    with pytest.raises(PackageDenied) as refused:
        await install(caller, "acme")

    assert sentence in refused.value.detail
    await free.arefresh_from_db()
    assert free.lock_id is None


def write_advisory(path, identifier: str, name: str, **event: str) -> None:
    events = [{kind: version} for kind, version in event.items()]
    affected = [{"package": {"ecosystem": "PyPI", "name": name}, "ranges": [{"type": "ECOSYSTEM", "events": events}]}]
    path.write_text(json.dumps({"id": identifier, "modified": "2026-11-01T10:00:00Z", "affected": affected}))


@pytest.mark.django_db
def test_an_advisory_names_the_versions_in_its_range_and_nobody_knows_without_a_file(tmp_path):
    assert advisories.Known(["acme"]).of("acme", "1.0") is None
    write_advisory(tmp_path / "a.json", "OSV-1", "Acme", introduced="1.0", fixed="2.0")

    assert advisories.take(tmp_path / "a.json") == (1, 0)

    known = advisories.Known(["acme"])
    assert [bool(known.of("acme", v)) for v in ("0.9", "1.0", "1.9", "2.0")] == [False, True, True, False]
    (tmp_path / "b.json").write_text(
        json.dumps([{"id": "OSV-1", "modified": "2026-11-02T10:00:00Z", "withdrawn": "2026-11-02T10:00:00Z"}])
    )
    assert advisories.take(tmp_path / "b.json") == (0, 1)
    assert not Advisory.objects.exists()


@pytest.mark.parametrize(
    ("name", "other"),
    [("reqeusts", "requests"), ("panda", "pandas"), ("numpyy", "numpy"), ("scikitlearn", "scikit-learn"), ("requests", ""), ("polars", ""),
     ("acme", "")],
)  # fmt: skip
def test_a_name_that_is_almost_a_popular_one_is_recognised(name, other):
    assert names.imitated(name) == other


@pytest.mark.django_db(transaction=True)
async def test_what_is_asked_about_waits_for_a_person_and_is_installed_once_approved(caller, free, served, ada):
    served.add("acme", "2.0", requires=("part",))
    served.add("part", "1.0")
    await PackagePolicy.objects.acreate(team=caller.team, ask=["acme"])

    with pytest.raises(
        ApprovalPending,
        match=r"The policy of team Engines has a person approve acme 2\.0\. It waits for a person as apr_",
    ):
        await install(caller, "acme")
    with pytest.raises(ApprovalPending):
        await install(caller, "acme")

    waiting = await Approval.objects.aget()
    assert [(pin["name"], pin["answer"], pin["needed_by"]) for pin in waiting.pins] == [
        ("acme", "ask", []),
        ("part", "allow", ["acme"]),
    ]
    assert waiting.pins[0]["licence"] == ""
    assert waiting.pins[0]["advisories"] is None
    by = caller.__class__(team=caller.team, agent=None, person=ada, door="admin")
    await rows(lambda: approvals.settle(waiting, caller=by, approve=True, reason="we know it"))
    done = await install(caller, "acme")
    assert done.added == {"acme": "2.0", "part": "1.0"}
    assert done.packages[0].reason == "ada has approved acme 2.0 for agent etl"
    assert await AuditEvent.objects.filter(action="packages_approved").aexists()


@pytest.mark.django_db(transaction=True)
async def test_what_a_person_has_denied_stays_denied_with_the_reason(caller, free, served, ada):
    served.add("acme", "2.0")
    await PackagePolicy.objects.acreate(team=caller.team, ask=["*"])
    with pytest.raises(ApprovalPending):
        await install(caller, "acme")
    by = caller.__class__(team=caller.team, agent=None, person=ada, door="admin")
    waiting = await Approval.objects.aget()
    await rows(lambda: approvals.settle(waiting, caller=by, approve=False, reason="not maintained"))

    with pytest.raises(PackageDenied, match=r"ada has denied acme 2\.0: not maintained\."):
        await install(caller, "acme")


@pytest.mark.django_db(transaction=True)
async def test_a_lock_grows_keeps_its_versions_and_can_be_taken_back(caller, free, served, ada):
    served.add("acme", "1.0")
    first = await install(caller, "acme")
    served.add("acme", "2.0")
    served.add("other", "1.0")

    second = await install(caller, "other")

    assert (second.added, second.changed) == ({"other": "1.0"}, {})
    assert second.lock_hash != first.lock_hash
    event = await AuditEvent.objects.filter(action="agent_changed").alatest("seq")
    assert event.reason == "packages: +other 1.0"
    by = caller.__class__(team=caller.team, agent=None, person=ada, door="admin")
    await rows(lambda: operations.revert(event, caller=by, reason="too much"))
    assert (await rows(operations.lock_of, caller, None)).digest == first.lock_hash


@pytest.mark.django_db(transaction=True)
async def test_two_who_change_a_lock_at_once_both_get_what_they_asked_for(caller, free, served):
    served.add("acme", "1.0")
    served.add("other", "1.0")

    await asyncio.gather(install(caller, "acme"), install(caller, "other"))

    assert (await rows(operations.lock_of, caller, None)).versions == {"acme": "1.0", "other": "1.0"}


@pytest.mark.django_db(transaction=True)
async def test_many_who_ask_for_the_same_at_once_fetch_it_once(caller, free, served):
    file = served.add("acme", "1.0", {"acme.py": b"x = 1\n" * 1000})

    await asyncio.gather(*(operations.install_for_agent(caller=caller, requirements=["acme"]) for _ in range(12)))

    assert served.fetches(file) == 1


@pytest.mark.django_db(transaction=True)
async def test_a_source_that_would_run_code_is_never_built(caller, free, served, tmp_path):
    served.add_source("acme", "1.0", b"not even an archive")

    with processes_seen() as started, pytest.raises(InstallFailed, match="It cannot be installed"):
        await install(caller, "acme")

    assert started == ["subprocess.Popen"]  # uv alone
    assert served.served[next(p for p in served.served if "simple" in p)]
    assert not served.fetches("acme-1.0.tar.gz")


@pytest.mark.django_db(transaction=True)
async def test_a_wheel_that_is_not_what_the_index_said_is_not_taken(caller, free, served):
    served.add("acme", "1.0", sha256="0" * 64)

    with pytest.raises(InstallFailed, match="it has another hash"):
        await install(caller, "acme")


@pytest.mark.django_db(transaction=True)
async def test_credentials_of_an_index_are_used_and_never_kept(caller, free, served, settings, tmp_path):
    settings.PACKAGE_INDEX = settings.PACKAGE_INDEX.replace("http://", "http://ada:geheim@")
    served.add("acme", "1.0")

    await install(caller, "acme")
    with pytest.raises(InstallFailed) as failed:
        await install(caller, "missing-one")

    assert served.logins
    assert "geheim" not in failed.value.detail
    kept = [
        path
        for path in (tmp_path / "packages").rglob("*")
        if path.is_file() and "uv" not in path.relative_to(tmp_path).parts
    ]
    assert not [path for path in kept if b"geheim" in path.read_bytes()]
    assert "geheim" not in json.dumps((await rows(operations.lock_of, caller, None)).pins)


@pytest.mark.django_db(transaction=True)
async def test_a_name_of_the_private_index_is_taken_from_nowhere_else(caller, free, served, settings):
    with running_index() as private:
        settings.PACKAGE_INDEX_PRIVATE = f"{private.url}/simple"
        private.add("acme", "1.0")
        served.add("acme", "9.0")
        await PackagePolicy.objects.acreate(team=caller.team, private=["acme*"])

        done = await install(caller, "acme")

    assert done.added == {"acme": "1.0"}


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    "answer",
    [
        '[[3,11],"x86_64",{"a\\n-i http://127.0.0.1:9/simple\\nb":"1"}]', '[[3,11],"x86_64",{"a":"1\\n-r /etc/passwd"}]',
        '[[3,11],"x86\\n",{}]', "nothing", "x" * 1_100_000,
    ],
)  # fmt: skip
async def test_what_a_guest_answers_in_pythons_place_never_reaches_uv(caller, free, served, monkeypatch, answer):
    session = await operations.open_session(caller=caller, request=SessionRequest())

    async def lies(self, handle, command, timeout_seconds):
        yield Event("stdout", {"text": answer})
        yield Event("exit", {"exit_code": 0})

    monkeypatch.setattr(ScriptedBackend, "run_command", lies)
    with pytest.raises(InstallFailed, match=r"no Python that answers|prints without end"):
        await bases.of_sandbox(session)


# Wheels


def wheel_with(path: str, content: bytes = b"", mode: int = 0) -> bytes:
    whole = io.BytesIO(made("acme", "1.0", {"acme.py": "x = 1\n"}))
    with zipfile.ZipFile(whole, "a") as archive:
        entry = zipfile.ZipInfo(path)
        entry.external_attr = mode << 16
        archive.writestr(entry, content)
    return whole.getvalue()


def zip_with(entries: bytes) -> bytes:
    """Ends as a zip file whose list of entries this is."""
    return entries + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(entries), 0, 0)


ATTACKS = {
    "endless list of files": zip_with(b"\0" * (17 << 20)),
    "too many files": zip_with((b"PK\1\2" + b"\0" * 42) * 60_001),
    "leads out": wheel_with("../../outside.py"),
    "absolute path": wheel_with("/etc/cron.d/x"),
    "absolute once spread": wheel_with("acme-1.0.data/purelib//etc/cron.d/x"),
    "a name that is none": wheel_with("."),
    "windows path": wheel_with("..\\outside.py"),
    "link": wheel_with("acme/link", b"/etc/passwd", stat.S_IFLNK | 0o777),
    "device": wheel_with("acme/fifo", b"", stat.S_IFIFO | 0o644),
    "bomb": made("acme", "1.0", {"big.py": b"\0" * (80 << 20)}),
    "another name": made("other", "1.0", {"x.py": ""}),
    "another version": made("acme", "2.0", {"x.py": ""}),
    "no wheel": b"PK nothing",
}


@pytest.mark.parametrize("attack", ["endless list of files", "too many files"])
def test_a_list_of_files_that_would_fill_the_memory_is_not_opened(attack, tmp_path, monkeypatch):
    path = tmp_path / "stored"
    path.write_bytes(ATTACKS[attack])
    monkeypatch.setattr(zipfile, "ZipFile", None)

    with pytest.raises(InstallFailed, match=r"acme-1.0-py3-none-any.whl has (a list of files of|60,001 files)"):
        wheels.examined(path, wheel="acme-1.0-py3-none-any.whl", name="acme", version="1.0")


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_wheel_is_found_out_before_it_is_unpacked(attack, tmp_path):
    path = tmp_path / "stored"
    path.write_bytes(ATTACKS[attack])

    with pytest.raises(InstallFailed):
        wheels.examined(path, wheel="acme-1.0-py3-none-any.whl", name="acme", version="1.0")


def test_nothing_is_unpacked_outside_of_its_folder(tmp_path):
    outside = tmp_path / "outside.py"
    (tmp_path / "stored").write_bytes(wheel_with(f"acme-1.0.data/purelib/{outside}", b"x = 1"))

    with pytest.raises(InstallFailed, match="leads out of it"):
        wheels.unpack(tmp_path / "stored", tmp_path / "out")

    assert not outside.exists()


def test_what_a_python_would_run_by_itself_is_left_out(tmp_path):
    files = {
        "evil.pth": "import os",
        "./second.pth": "import os",
        "sitecustomize.py": "",
        "usercustomize/__init__.py": "",
        "acme/data.pth": "kept",
        "acme-1.0.data/scripts/x": "",
        "acme-1.0.data/purelib/deep/m.py": "",
    }
    (tmp_path / "stored").write_bytes(made("acme", "1.0", files))

    wheels.unpack(tmp_path / "stored", tmp_path / "out")

    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {path for path in found if "dist-info" not in path} == {"acme/data.pth", "deep/m.py"}


@pytest.mark.django_db
def test_one_decision_for_a_licence_that_nobody_knows(agent, team):
    agent.packages = ["acme"]
    rules = [PackagePolicy(team=team, licences=["MIT", "BSD*"], unknown="ask")]

    def answer(licence: str) -> str:
        return packages.decide(agent, rules, Item("acme", "1.0", licence=licence)).answer

    assert [answer(x) for x in ("MIT", "BSD-3-Clause OR GPL-3.0-only", "MIT AND GPL-3.0-only", "")] == [
        "allow",
        "allow",
        "deny",
        "ask",
    ]


def test_a_layer_is_unpacked_once_and_readable_by_all(settings, tmp_path):
    settings.DATA = tmp_path
    content = made("acme", "1.0", {"acme/__init__.py": "x = 1\n"})
    index.kept("ab" * 32).write_bytes(content)
    under = tmp_path / "layers"
    under.mkdir()

    name = layers.folder(["ab" * 32], under, compiled=True)

    assert stat.S_IMODE((under / name / "acme/__init__.py").stat().st_mode) == 0o644
    assert list((under / name / "acme/__pycache__").glob("*.pyc"))
    assert layers.folder(["ab" * 32], under, compiled=True) == name
