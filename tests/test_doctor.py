"""The doctor tries each wall and says what to type, on this machine and on those that look like others."""

from __future__ import annotations

import subprocess
import sys

import pytest

from executions.backends.base import Check
from executions.management import screen, walls
from tests.local.test_reduced import confined
from tests.product import HOME, environment


def doctor(data, *, preexec_fn=None, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "manage.py", "doctor"],
        cwd=HOME,
        env=environment(data, 28999, None, **more),
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=preexec_fn,
    )


def lines(text: str) -> dict[str, str]:
    """What stands under each name, the remedy with it."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if line[:2] in ("ok", "--", "!!"):
            name = line[4:26].strip()
        found[name] = found.get(name, "") + line + "\n"
    return found


def test_without_a_node_the_walls_are_tried_all_the_same(tmp_path):
    done = doctor(tmp_path)

    said = lines(done.stdout)
    assert done.returncode == 0, done.stderr
    for wall in ("namespaces", "uid", "capabilities", "cgroups", "seccomp", "landlock", "readonly_root"):
        assert "stands" in said[wall] or said[wall].startswith("--")
    assert said["namespaces"].startswith("ok")


def test_where_namespaces_are_refused_it_names_the_reduced_mode_and_both_ways_on(tmp_path):
    done = doctor(tmp_path, preexec_fn=confined)

    said = lines(done.stdout)
    assert done.returncode == 0, done.stderr
    assert "reduced" in said["backend local"]
    assert "SANDGATE_ISOLATION_FLOOR=reduced make run" in said["backend local"]
    assert "Operation not permitted" in said["namespaces"]
    assert "--security-opt seccomp=unconfined" in said["namespaces"]


def test_a_lowered_floor_is_no_complaint(tmp_path):
    said = lines(doctor(tmp_path, preexec_fn=confined, SANDGATE_ISOLATION_FLOOR="reduced").stdout)

    assert "SANDGATE_ISOLATION_FLOOR" not in said["backend local"]


def test_an_unknown_floor_stops_the_start_with_those_there_are(tmp_path):
    done = doctor(tmp_path, SANDGATE_ISOLATION_FLOOR="bricks")

    assert done.returncode == 1
    assert "'bricks' is none of none, reduced, namespaces, microvm" in done.stderr


MACHINES = {
    "namespaces switched off": ({"sys/user/max_user_namespaces": "0"}, 1000, "sudo sysctl -w user.max_user_namespaces"),
    "Debian's switch": ({"sys/kernel/unprivileged_userns_clone": "0"}, 1000, "kernel.unprivileged_userns_clone=1"),
    "Ubuntu 24.04": ({"sys/kernel/apparmor_restrict_unprivileged_userns": "1"}, 1000, "/etc/apparmor.d/sandgate"),
    "a container": ({"self/status": "Name:\tx\nSeccomp:\t2\n"}, 0, "--security-opt seccomp=unconfined"),
    "an ordinary user elsewhere": ({}, 1000, "sudo .venv/bin/python manage.py sandbox_node"),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_what_to_type_for_namespaces_depends_on_who_refuses_them(machine, tmp_path):
    files, uid, typed = MACHINES[machine]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    assert typed in walls.remedy("namespaces", tmp_path, uid)


def test_the_apparmor_profile_is_whole_and_names_this_interpreter(tmp_path):
    (tmp_path / "sys/kernel").mkdir(parents=True)
    (tmp_path / "sys/kernel/apparmor_restrict_unprivileged_userns").write_text("1\n")

    text = walls.remedy("namespaces", tmp_path, 1000)

    assert "userns," in text
    assert text.count("{") == text.count("}") == 1
    assert "/python" in text


@pytest.mark.parametrize(("wall", "typed"), [("cgroups", "Delegate=yes"), ("uid", "sudo"), ("landlock", "lsm=")])
def test_an_ordinary_user_is_told_what_to_type_for_every_other_wall(wall, typed):
    assert typed in walls.remedy(wall, uid=1000)


def test_the_start_screen_of_a_machine_below_the_floor_says_what_to_type():
    check = Check(ok=False, isolation="reduced", walls={"namespaces": "Refused."})

    said = screen.walls(check, "this machine gives … 'reduced', which is below the floor (namespaces); more words")

    assert "makes no sandboxes" in said
    assert "SANDGATE_ISOLATION_FLOOR=reduced make run" in said


def test_the_start_screen_names_the_reduced_mode_in_capitals():
    said = screen.walls(Check(ok=True, isolation="reduced", walls={"seccomp": True, "namespaces": "Refused."}))

    assert "REDUCED ISOLATION" in said
    assert "missing: namespaces: Refused." in said
