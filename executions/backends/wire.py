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
DEPTH_LIMIT = 100
FIELD = {mime: field for field, mime in MIME.items()}


def unquoted(text: str) -> str:
    """The text without the quotes of a string's repr, as E2B shows it."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text


def flat(value: Any, left: int = DEPTH_LIMIT) -> bool:
    """Whether containers are nested at most `left` deep: what is deeper breaks whoever reads, stores or sends it on."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return True
    return left > 0 and all(flat(one, left - 1) for one in value if isinstance(one, list | dict))


def to_e2b(mime: dict[str, Any]) -> dict[str, Any]:
    """The fields of an E2B result from a MIME bundle; what has no field of its own goes to `extra`."""
    fields: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for kind, value in mime.items():
        if not flat(value):
            continue
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
    """The MIME bundle from the fields of an E2B result; nulls, and what is nested too deeply, are left out."""
    bundle = {
        mime: fields[field] for field, mime in MIME.items() if fields.get(field) is not None and flat(fields[field])
    }
    extra = fields.get("extra")
    if isinstance(extra, dict):
        bundle.update({kind: value for kind, value in extra.items() if kind not in bundle and flat(value)})
    return bundle


def said(line: Any) -> tuple[str, dict[str, Any]] | None:
    """Kind and data of our event from one line of E2B's stream; None for keepalives and for what is unknown or malformed."""
    match line:
        case {"type": "stdout" | "stderr" as kind, "text": str(text)}:
            return kind, {"text": text}
        case {"type": "result"}:
            return "result", {"main": line.get("is_main_result") is True, "mime": to_mime(line)}
        case {"type": "error"}:
            return "error", {name: str(line.get(name) or "") for name in ("name", "value", "traceback")}
        case {"type": "number_of_executions", "execution_count": int(count)}:
            return "count", {"execution_count": count}
    return None


def line_of(kind: str, data: dict[str, Any], timestamp: str) -> dict[str, Any] | None:
    """E2B's line for our event; None for what E2B has no line for. `timestamp` is when it was said (ISO 8601)."""
    match kind:
        case "stdout" | "stderr":
            return {"type": kind, "text": data["text"], "timestamp": timestamp}
        case "result":
            return {**to_e2b(data["mime"]), "type": "result", "is_main_result": data["main"]}
        case "error":
            return {"type": "error", **{name: data[name] for name in ("name", "value", "traceback")}}
        case "count":
            return {"type": "number_of_executions", "execution_count": data["execution_count"]}
    return None
