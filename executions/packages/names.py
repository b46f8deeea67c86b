"""Names: what a caller may ask for, and which names only look like a popular one."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from packaging.requirements import Requirement

from executions import requirements
from executions.errors import Invalid

SHORT = 5  # letters; among shorter names every second one is a letter away from another


def requirements_of(texts: list[str]) -> list[Requirement]:
    """What was asked for, parsed. Raises Invalid for anything that is more than names with plain versions."""
    try:
        return [requirements.parsed(text) for text in texts]
    except ValueError as problem:
        raise Invalid(f"packages: {problem}", field="packages") from None


def name_of(requirement: str) -> str:
    """The normalised name of a requirement such as `emoji>=2`. Raises Invalid for anything that is more than that."""
    return requirements_of([requirement])[0].name


@cache
def popular() -> dict[str, str]:
    """Names that others imitate, by their letters alone."""
    lines = Path(__file__).with_name("popular.txt").read_text().split()
    return {name.replace("-", ""): name for name in lines}


def imitated(name: str) -> str:
    """The popular name that this one differs from by a letter or a hyphen; empty where there is none."""
    letters = name.replace("-", "")
    known = popular()
    if letters in known:
        return "" if known[letters] == name else known[letters]
    if len(letters) < SHORT:
        return ""
    return next((found for other, found in known.items() if len(other) >= SHORT and _one_apart(letters, other)), "")


def _one_apart(a: str, b: str) -> bool:
    """Whether one letter was left out, added, exchanged for another, or swapped with its neighbour."""
    if abs(len(a) - len(b)) > 1:
        return False
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    rest_a, rest_b = a[at:], b[at:]
    if rest_a[1:] == rest_b or rest_a == rest_b[1:] or rest_a[1:] == rest_b[1:]:
        return True
    return rest_a[:2] == rest_b[1::-1] and rest_a[2:] == rest_b[2:]
