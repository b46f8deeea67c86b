"""What callers may send; a field that is not known is refused by name."""

from __future__ import annotations

import base64
import binascii
import posixpath
from decimal import Decimal
from typing import Annotated, Any, TypeVar

from django.conf import settings
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from executions import globs
from executions.errors import Invalid, TooLarge
from executions.journal import OUTPUT_BYTES, RESULTS
from executions.network import MOST_RULES


def _patterns(patterns: list[str] | None) -> list[str] | None:
    return None if patterns is None else globs.normalised(patterns)


def nano(dollars: Decimal | None) -> int | None:
    """Nano-dollars; None where nothing was said."""
    return None if dollars is None else int(dollars * 1_000_000_000)


Dollars = Annotated[Decimal, Field(ge=0, le=1_000_000, decimal_places=9)]
NameValue = dict[
    Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)], Annotated[str, Field(max_length=32_768)]
]
Short = Annotated[str, Field(max_length=100)]
Hosts = Annotated[
    list[str] | None,
    Field(
        description="Fewer hosts than the agent may reach; [] is no network. Left out: the agent's.",
        max_length=MOST_RULES,
    ),
]

Kept = Annotated[list[Annotated[str, Field(max_length=250)]] | None, AfterValidator(_patterns)]


class Accepted(BaseModel):
    """What a caller may send; a field that is not known is refused by name."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=False)


class RunLimits(Accepted):
    """Ceilings of one run below the usual ones; what is left out stays as usual."""

    memory_mib: int | None = Field(None, ge=64, description="Of its fresh sandbox; not above the template's.")
    cpu_seconds: int | None = Field(None, ge=1, le=86_400, description="CPU time of all its processes together.")
    output_bytes: int | None = Field(None, ge=0, le=OUTPUT_BYTES, description="Of stdout and stderr that is kept.")
    results: int | None = Field(None, ge=0, le=RESULTS, description="How many results are kept.")


class KeptFile(Accepted):
    """A file that an earlier run or session has kept."""

    artifact: str = Field(max_length=40)


class Submission(Accepted):
    """One execution that is asked for."""

    code: str | None = Field(None, description="What to run: one cell. Up to 1 MB.")
    script_path: str | None = Field(
        None,
        description="Instead of code: a file that is in the session's sandbox, or one of `files`.",
        min_length=1,
        max_length=4096,
    )
    command: str | None = Field(None, description="Instead of code: a line for bash.", min_length=1, max_length=32_000)
    args: list[str] = Field([], description="Arguments of the script.", max_length=256)
    language: str = Field(
        "python", description="python, bash, javascript, typescript, r or java, as the backend has them.", max_length=20
    )
    template: Short | None = Field(None, description="What a fresh sandbox is made from.")
    agent: Short | None = Field(None, description="Which agent runs it; only a team's key needs to say.")
    route: list[Short] | None = Field(
        None, description="Backend aliases in order, instead of the agent's own route.", max_length=8
    )
    session_id: str | None = Field(
        None, description="The session to run in. Left out: a fresh sandbox, gone afterwards.", max_length=40
    )
    context_id: str | None = Field(
        None, description="A context of the session; left out: the language's default one.", max_length=64
    )
    files: dict[str, str | KeptFile] = Field(
        {}, description='Files to write first: path to base64, or to {"artifact": "art_…"}.', max_length=64
    )
    env: NameValue = Field({}, description="Environment variables of this run only.")
    timeout_seconds: int | None = Field(None, ge=1, description="Wall time; left out: the agent's default.")
    limits: RunLimits = Field(
        RunLimits(), description="Reaching one is said by its name in error_code or limits_reached."
    )
    network: Hosts = None
    cancel_on_disconnect: bool = Field(False, description="Stop the run when the waiting caller goes away.")
    user: str = Field("", description="Your own end user, for records and costs.", max_length=200)
    workflow: Short = ""
    step: Short = ""
    parent: str | None = Field(None, description="The execution that this one belongs to.", max_length=40)
    metadata: dict[str, str] = Field({}, max_length=32)
    max_wait_seconds: int | None = Field(
        None, ge=0, le=3600, description="How long it may wait when there is no room; 0: refuse it. Left out: as ruled."
    )
    keep_files: Kept = Field(
        None,
        description="Folders and globs below /home/user that are kept as artifacts at its end. Left out: the agent's.",
    )
    max_cost_usd: Dollars | None = Field(
        None, description="Refused (402) where its worst case is above this. Dollars: a number or a decimal string."
    )
    dry_run: bool = Field(
        False,
        strict=True,
        description="Answer what it would cost at most, and whether it would be admitted (200); nothing is stored.",
    )

    @field_validator("code")
    @classmethod
    def code_fits(cls, code: str | None) -> str | None:
        if code is not None and len(code.encode(errors="surrogatepass")) > settings.CODE_MAX_BYTES:
            raise TooLarge(f"The code has more than {settings.CODE_MAX_BYTES:,} bytes.", field="code")
        return code

    @field_validator("files")
    @classmethod
    def files_are_base64(cls, files: dict[str, str | KeptFile]) -> dict[str, str | KeptFile]:
        for path, content in files.items():
            try:
                base64.b64decode("" if isinstance(content, KeptFile) else content, validate=True)
            except (binascii.Error, ValueError) as e:
                raise ValueError(f"the content of {path!r} is not base64") from e
        return files

    @model_validator(mode="after")
    def one_thing_to_run(self) -> Submission:
        if sum(what is not None for what in (self.code, self.script_path, self.command)) != 1:
            raise Invalid("code: send either code, script_path or command.", field="code")
        if self.code is not None and not self.code.strip():
            raise Invalid("code: it is empty.", field="code")
        if self.script_path is not None and self.session_id is None and not self._brings(self.script_path):
            raise Invalid(
                "session_id: it is missing; script_path names a file in a session, or one of `files`.",
                field="session_id",
            )
        return self

    def _brings(self, path: str) -> bool:
        """Whether `files` writes it."""
        return _absolute(path) in map(_absolute, self.files)


def _absolute(path: str) -> str:
    return posixpath.normpath(posixpath.join("/home/user", path))


class SessionRequest(Accepted):
    """A sandbox that is to be kept."""

    template: Short | None = None
    agent: Short | None = None
    route: list[Short] | None = Field(None, max_length=8)
    name: Short = ""
    timeout_seconds: int = Field(1800, ge=10, le=86_400, description="Its absolute end, from now.")
    idle_timeout_seconds: int = Field(600, ge=10, le=86_400, description="It ends when nothing has run for so long.")
    env: NameValue = {}
    network: Hosts = None
    metadata: dict[str, str] = Field({}, max_length=32)
    pause_after_seconds: int | None = Field(
        None,
        ge=0,
        le=86_400,
        description="It is paused when nothing has run for so long; 0: never. Left out: the agent's.",
    )
    keep_files: Kept = Field(
        None, description="Folders and globs below /home/user that are kept as artifacts at its end. Left out: outputs."
    )
    max_cost_usd: Dollars | None = Field(
        None, description="Refused (402) where keeping it until its end could cost more."
    )


class CancelRequest(Accepted):
    reason: str = Field("", max_length=200)


class InstallRequest(Accepted):
    packages: list[Annotated[str, Field(max_length=200)]] = Field(min_length=1, max_length=50)


A = TypeVar("A", bound=Accepted)


def parse(kind: type[A], data: Any) -> A:
    """The request as an object. Raises Invalid with the field's name."""
    if not isinstance(data, dict):
        raise Invalid("The body must be a JSON object.", field="body")
    for name, value in data.items():
        _refuse_unstorable(name, "body")
        _refuse_unstorable(value, name)
    try:
        return kind.model_validate(data)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"] if part != "[key]") or "body"
        message = first["msg"].removeprefix("Value error, ")
        raise Invalid(f"{field}: {message[:1].lower()}{message[1:]}.", field=field) from None


def _refuse_unstorable(value: Any, field: str) -> None:
    """PostgreSQL stores no NUL, and a lone surrogate is no text at all."""
    match value:
        case str():
            if "\x00" in value or (not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value)):
                raise Invalid(f"{field}: a NUL or half of a surrogate pair cannot be part of it.", field=field)
        case list():
            for item in value:
                _refuse_unstorable(item, field)
        case dict():
            for key, item in value.items():
                _refuse_unstorable(key, field)
                _refuse_unstorable(item, field)
