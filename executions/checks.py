"""Mistakes of configuration, all listed together at start-up, each with a number and a hint."""

from __future__ import annotations

from pathlib import Path

from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, Warning, register
from django.db import DatabaseError
from django.utils.module_loading import import_string

from executions.costs import usd
from executions.reports import spend


@register(Tags.compatibility)
def sandboxes(app_configs, **kwargs):
    found: list[CheckMessage] = []
    if not settings.SANDBOXES:
        found.append(
            Error(
                "settings.SANDBOXES is empty: nothing could run.",
                hint="Configure at least one backend.",
                id="executions.E001",
            )
        )
    for alias, entry in settings.SANDBOXES.items():
        if not alias.replace("-", "").replace("_", "").isalnum() or len(alias) > 40:
            found.append(
                Error(f"{alias!r} is not an alias.", hint="Letters, digits, - and _; at most 40.", id="executions.E002")
            )
        try:
            import_string(entry["BACKEND"])
        except (KeyError, ImportError) as e:
            found.append(
                Error(
                    f"Backend {alias!r} cannot be loaded: {e}",
                    hint="BACKEND is a dotted path to a class.",
                    id="executions.E003",
                )
            )
    return found


@register(Tags.security)
def exposure(app_configs, **kwargs):
    found: list[CheckMessage] = []
    loopback = settings.BIND in ("127.0.0.1", "localhost", "::1")
    if not loopback and not settings.HTTPS:
        found.append(
            Warning(
                f"SANDGATE_BIND={settings.BIND} listens beyond this machine while SANDGATE_PUBLIC_URL is plain http.",
                hint="Put TLS in front and set SANDGATE_PUBLIC_URL=https://…; keys travel in clear text otherwise.",
                id="executions.W001",
            )
        )
    if len(settings.SECRET_KEY) < 32:
        found.append(
            Error(
                "SECRET_KEY is shorter than 32 characters.",
                hint="Leave it out: one is made and kept in the data folder.",
                id="executions.E004",
            )
        )
    if not 1 <= settings.PORT <= 65535:
        found.append(Error(f"PORT={settings.PORT} is not a port.", hint="1 to 65535.", id="executions.E005"))
    return found


@register(Tags.security)
def ceiling(app_configs, **kwargs):
    if settings.RATE_CEILING_NANO_USD_PER_SECOND >= 0:
        return []
    return [
        Error(
            f"SANDGATE_RATE_CEILING_NANO_USD_PER_SECOND={settings.RATE_CEILING_NANO_USD_PER_SECOND} is below zero.",
            hint="Nano-dollars a second where no rate is known; 0 refuses such backends (rate_unknown).",
            id="executions.E008",
        )
    ]


@register(Tags.database)
def rates(app_configs, databases=None, **kwargs):
    """Runs where a database is asked for: `manage.py check --database default`, and `migrate`."""
    if not databases:
        return []
    try:
        unrated = spend.unrated()
    except DatabaseError:  # before the first migration
        return []
    charged = settings.RATE_CEILING_NANO_USD_PER_SECOND
    what = f"is charged the ceiling, {usd(charged)} a second" if charged else "is refused (rate_unknown)"
    return [
        Warning(
            f"No rate is known for backend {alias!r}: whoever asks for it {what}.",
            hint="Enter what a vCPU-second and a GiB-second cost there: admin, Money → Rates.",
            id="executions.W002",
        )
        for alias in unrated
    ]


@register(Tags.files)
def folders(app_configs, **kwargs):
    data = Path(settings.DATA)
    if settings.TEMPLATE_PYTHON and not Path(settings.TEMPLATE_PYTHON).exists():
        return [
            Error(
                f"SANDGATE_TEMPLATE_PYTHON={settings.TEMPLATE_PYTHON} does not exist.",
                hint="The Python of an environment made from executions/backends/local/data.txt; leave it out to have one made.",
                id="executions.E006",
            )
        ]
    if data.exists() and not data.is_dir():
        return [
            Error(
                f"SANDGATE_DATA={data} is not a folder.",
                hint="Name a folder that this user may write.",
                id="executions.E007",
            )
        ]
    return []
