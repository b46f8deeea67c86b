"""Results between E2B's JSON and MIME bundles. Pure functions: backends, the gateway and the sandbox's agent share them."""

from __future__ import annotations

from typing import Any

MIME = {
    "text": "text/plain",
    "html": "text/html",
    "markdown": "text/markdown",
    "svg": "image/svg+xml",
    "png": "image/png",
    "jpeg": "image/jpeg",
    "pdf": "application/pdf",
    "latex": "text/latex",
    "json": "application/json",
    "javascript": "application/javascript",
    "data": "e2b/data",
    "chart": "e2b/chart",
}
FIELD = {mime: field for field, mime in MIME.items()}


def unquoted(text: str) -> str:
    """The text without the quotes of a string's repr, as E2B shows it."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text


def to_e2b(mime: dict[str, Any]) -> dict[str, Any]:
    """The fields of an E2B result from a MIME bundle; what has no field of its own goes to `extra`."""
    fields: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for kind, value in mime.items():
        if kind in FIELD:
            fields[FIELD[kind]] = value
        else:
            extra[kind] = value
    if isinstance(fields.get("text"), str):
        fields["text"] = unquoted(fields["text"])
    if extra:
        fields["extra"] = extra
    return fields


def to_mime(fields: dict[str, Any]) -> dict[str, Any]:
    """The MIME bundle from the fields of an E2B result; nulls are left out."""
    bundle = {mime: fields[field] for field, mime in MIME.items() if fields.get(field) is not None}
    extra = fields.get("extra")
    if isinstance(extra, dict):
        bundle.update({kind: value for kind, value in extra.items() if kind not in bundle})
    return bundle
