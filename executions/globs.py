"""Which files a pattern means: folders and globs below /home/user, or absolute. Imports nothing of ours."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

HOME = "/home/user"
MOST_PATTERNS = 16
MAGIC = frozenset("*?[")


def normalised(patterns: Iterable[object]) -> list[str]:
    """Patterns as they are stored. Raises ValueError with the reason."""
    found = []
    for pattern in patterns:
        text = str(pattern).strip().removeprefix("~/").removeprefix("./").removeprefix(HOME + "/").rstrip("/")
        if not text or len(text) > 200 or any(ord(c) < 32 or ord(c) == 127 for c in text):
            raise ValueError(f"{pattern!r} is no folder or glob of at most 200 characters, such as outputs or *.csv")
        if ".." in text.split("/"):
            raise ValueError(f"{pattern!r}: `..` is not followed")
        found.append(text)
    if len(found) > MOST_PATTERNS:
        raise ValueError(f"at most {MOST_PATTERNS} folders and globs")
    return found


def is_literal(part: str) -> bool:
    return not MAGIC & set(part)


def rests(left: tuple[str, ...], name: str) -> list[tuple[str, ...]]:
    """What is left of a pattern's parts behind an entry of this name; () where they are matched to their end."""
    if left[0] == "**":  # any number of folders, none too
        return [left, *(rests(left[1:], name) if len(left) > 1 else [()])]
    return [left[1:]] if fnmatchcase(name, left[0]) else []
