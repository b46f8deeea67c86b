"""The house keeps its shape: folders, layers, lazy imports, documentation."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).parent.parent
TOP = set(
    "manage.py config executions templates static tests requirements.txt README.md pyproject.toml Makefile LICENSE "
    "CHANGELOG.md CONTRIBUTING.md .ci .gitignore .env.example docs deploy".split()
)


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=HOME, capture_output=True, text=True, check=True)
    return listed.stdout.split("\0")[:-1]


def documentation() -> str:
    pages = [HOME / "README.md", HOME / ".env.example", *sorted((HOME / "docs").rglob("*.md"))]
    return "\n".join(page.read_text() for page in pages if page.exists())


def test_the_top_level_holds_what_a_newcomer_expects_and_nothing_else():
    assert {path.split("/")[0] for path in tracked()} <= TOP


def test_no_module_has_grown_past_one_screenful_of_ideas():
    ours = [
        path
        for path in tracked()
        if path.endswith(".py") and not path.startswith("tests/") and "/migrations/" not in path
    ]

    long = {path: lines for path in ours if (lines := (HOME / path).read_text().count("\n")) > 500}

    assert long == {}


def test_imports_only_go_down():
    linted = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as go; go()", "--no-cache"],
        cwd=HOME,
        capture_output=True,
        text=True,
    )

    assert linted.returncode == 0, linted.stdout


def test_starting_the_server_imports_nothing_heavy_before_it_is_needed():
    heavy = (
        "mcp",
        "e2b",
        "e2b_code_interpreter",
        "drf_spectacular.views",
        "procrastinate",
        "numpy",
        "pandas",
        "IPython",
    )
    program = f"import sys, config.asgi; print([name for name in {heavy} if name in sys.modules])"

    imported = subprocess.run(
        [sys.executable, "-c", program],
        cwd=HOME,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "DJANGO_SETTINGS_MODULE": "tests.settings"},
    )

    assert imported.stdout.strip() == "[]", imported.stderr


def test_every_setting_is_documented():
    read = set(re.findall(r"""env\.\w+\(\s*["']([A-Z0-9_]+)["']""", (HOME / "config" / "settings.py").read_text()))

    pages = documentation()

    assert {name for name in read if name not in pages} == set()


def test_every_error_code_is_documented():
    from executions import errors

    codes = {e.code for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.SandgateError)}

    pages = documentation()

    assert {code for code in codes if f"`{code}`" not in pages} == set()


def test_the_table_of_errors_is_the_generated_one():
    from executions import errors

    assert errors.table() in (HOME / "docs" / "errors.md").read_text(), "python -m executions.errors prints it"


def test_the_dollars_in_the_answers_are_what_the_shipped_rates_come_to():
    from tests.bench.answers import table

    page = (HOME / "docs" / "answers.md").read_text()

    assert [line for line in table() if line not in page] == []


def test_every_command_is_documented():
    commands = {p.stem for p in (HOME / "executions/management/commands").glob("*.py") if p.stem != "__init__"}

    pages = documentation()

    assert {name for name in commands if name not in pages} == set()


@pytest.mark.parametrize("host", [("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org")], ids="".join)
def test_no_file_names_a_registry(host):
    naming = subprocess.run(["git", "grep", "-liF", ".".join(host)], cwd=HOME, capture_output=True, text=True)

    assert naming.stdout == ""


def test_no_lock_names_a_folder_of_the_machine_that_made_it():
    locks = [
        "git",
        "grep",
        "-nE",
        r"^ *# .* /|@ file:",
        "--",
        "*requirements.txt",
        "*peers.txt",
        "*data.txt",
        "docs/*.txt",
    ]
    naming = subprocess.run(locks, cwd=HOME, capture_output=True, text=True)

    assert naming.stdout == ""


def test_the_locks_of_tests_and_product_agree():
    def pins(lock: str) -> set[str]:
        return set(re.findall(r"^([a-z0-9][\w.-]*==[^\s;]+)", (HOME / lock).read_text(), re.M))

    assert pins("requirements.txt") - pins("tests/requirements.txt") == set()
