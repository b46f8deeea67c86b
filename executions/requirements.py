"""Requirements as people and agents write them: `name[extra]>=1,<2` and nothing else, so that nothing is fetched or run by reading one."""

from __future__ import annotations

import re
from functools import lru_cache

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

# Checked first: what the letters cannot spell, the parser need not refuse (URLs, paths, options, markers, shell).
LETTERS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\s*(\[[A-Za-z0-9._, -]*\])?\s*\(?[A-Za-z0-9.*+!_<>=~, -]*\)?")


@lru_cache(2000)
def parsed(text: str) -> Requirement:
    """One requirement, its name normalised. ValueError, with a sentence, for anything that is more or less than that."""
    refused = ValueError(f"{text[:80]!r} is not a package name with plain version specifiers.")
    if not isinstance(text, str) or len(text) > 200 or not LETTERS.fullmatch(text.strip()) or "===" in text:
        raise refused
    try:
        found = Requirement(text.strip())
    except InvalidRequirement:
        raise refused from None
    if found.url or found.marker:
        raise refused
    found.name = canonicalize_name(found.name)
    return found


def names(text: str, name: str, version: str | None) -> bool:
    """Whether an entry of a policy ("*" or a requirement) names this package, or this version of it where one is known."""
    if text == "*":
        return True
    try:
        entry = parsed(text)
    except ValueError:
        return False
    return entry.name == name and (version is None or entry.specifier.contains(version, prereleases=True))


def entries(texts: object) -> list[str]:
    """Entries of a policy in one spelling. ValueError for what is none."""
    if not isinstance(texts, list):
        raise ValueError("It must be a list of requirements.")
    return [text if text == "*" else str(parsed(text)) for text in texts]
