"""The verb, its command, its row, and where they are seen."""

from __future__ import annotations

import io
import json

import pytest
from django.core.management import CommandError, call_command

from executions import attacks, operations
from executions.errors import Invalid
from executions.hop import rows
from executions.models import Attestation


@pytest.fixture
def few(monkeypatch):
    """Two attacks instead of all."""
    chosen = {"network": attacks.GROUPS["network"][1:3]}
    monkeypatch.setattr(attacks, "GROUPS", chosen)
    return [attack.name for attack in chosen["network"]]


@pytest.fixture
def local(settings, node):
    settings.SANDBOXES = {
        "local": {"BACKEND": "executions.backends.local.LocalBackend", "OPTIONS": {"RUN_DIR": str(node.run_dir)}}
    }


@pytest.mark.django_db
async def test_the_scorecard_is_kept_and_seen_by_programs(local, few):
    heard = []

    made = await operations.attest(alias="local", hear=heard.append)

    row = await rows(Attestation.objects.get)
    assert row.pk == made.pk
    assert (row.blocked, row.open, row.skipped) == (2, 0, 0)
    assert [case["case"] for case in row.cases] == few == [finding.case for finding in heard]
    assert row.walls["seccomp"] is True
    state = (await operations.backend_states())[0]
    assert state["attested"] == {"at": row.at, "blocked": 2, "open": 0, "skipped": 0}


@pytest.mark.django_db
async def test_a_part_of_the_suite_is_no_attestation(local, few):
    made = await operations.attest(alias="local", only=few[0])

    assert made.blocked == 1
    assert not await rows(Attestation.objects.exists)


@pytest.mark.django_db
async def test_a_backend_that_runs_no_code_proves_nothing(settings, few):
    settings.SANDBOXES = {"scripted": {"BACKEND": "executions.backends.scripted.ScriptedBackend", "OPTIONS": {}}}

    made = await operations.attest(alias="scripted")

    assert (made.blocked, made.open, made.skipped) == (0, 0, 2)


async def test_an_unknown_backend_or_case_is_refused(local):
    with pytest.raises(Invalid):
        await operations.attest(alias="nowhere")
    with pytest.raises(Invalid):
        await operations.attest(alias="local", only="nothing")


@pytest.mark.django_db(transaction=True)
def test_the_command_prints_a_line_for_each_case_and_json_for_programs(local, few):
    said, told = io.StringIO(), io.StringIO()

    call_command("attest", "local", stdout=said)
    call_command("attest", "local", "--json", stdout=told)

    assert [line.split()[3] for line in said.getvalue().splitlines()[:2]] == few
    assert "2 blocked, 0 open" in said.getvalue()
    assert [case["verdict"] for case in json.loads(told.getvalue())["cases"]] == ["blocked", "blocked"]
    with pytest.raises(CommandError):
        call_command("attest", "nowhere")


@pytest.mark.django_db(transaction=True)
def test_the_command_fails_when_an_attack_gets_through(local, monkeypatch):
    hole = attacks.Attack("hole", ("none",), code="attempt('anything', lambda: True)")
    monkeypatch.setattr(attacks, "GROUPS", {"files": (hole,)})
    said = io.StringIO()

    with pytest.raises(SystemExit) as ended:
        call_command("attest", stdout=said)

    assert ended.value.code == 1
    assert said.getvalue().startswith("open")
    assert Attestation.objects.get().open == 1


def test_no_secret_of_the_service_is_written_in_an_attack():
    from executions.operations.attest import secrets_of_the_service

    written = repr(attacks.ALL)

    assert secrets_of_the_service()
    assert not any(secret in written for secret in secrets_of_the_service())
