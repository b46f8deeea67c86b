"""What operators type, in the form in which they think it: names with commas, dollars, `NAME=value`."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any
from zoneinfo import available_timezones

from django import forms
from unfold.widgets import (
    UnfoldAdminCheckboxSelectMultipleWidget,
    UnfoldAdminDecimalFieldWidget,
    UnfoldAdminSelectWidget,
    UnfoldAdminTextareaWidget,
    UnfoldAdminTextInputWidget,
)

from executions import backends, costs, network, operations, packages
from executions.errors import Invalid
from executions.mcp import mapping
from executions.models import Agent, ApiKey, Quota, Rate, Team, Template
from executions.quotas import CONCURRENT
from executions.states import LANGUAGES, Scope, Unit, Window

LARGEST = 2**63 - 1


class Names(forms.CharField):
    """A list, typed with commas."""

    widget = UnfoldAdminTextInputWidget

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"required": False, **kwargs})

    def prepare_value(self, value: Any) -> Any:
        return ", ".join(map(str, value)) if isinstance(value, list) else value

    def to_python(self, value: Any) -> Any:
        if isinstance(value, list):
            return value
        return list(dict.fromkeys(filter(None, re.split(r"[,\s]+", value or ""))))


class KeptNames(Names):
    """A list that may also be left open (None): nothing typed leaves it open, `none` is the empty list."""

    def prepare_value(self, value: Any) -> Any:
        return "none" if value == [] else super().prepare_value(value)

    def to_python(self, value: Any) -> Any:
        found = super().to_python(value)
        return [] if found == ["none"] else found or None


class Lines(Names):
    """A list, typed as one entry a line."""

    widget = UnfoldAdminTextareaWidget

    def prepare_value(self, value: Any) -> Any:
        return "\n".join(map(str, value)) if isinstance(value, list) else value

    def to_python(self, value: Any) -> Any:
        if isinstance(value, list):
            return value
        return list(dict.fromkeys(filter(None, (line.strip() for line in (value or "").splitlines()))))


class ToolMapping(forms.CharField):
    """An agent's tools, typed as the YAML of docs/mcp.md; every mistake is told with its line."""

    widget = UnfoldAdminTextareaWidget

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"required": False, "strip": False, **kwargs})

    def prepare_value(self, value: Any) -> Any:
        return value if isinstance(value, str) else mapping.render(value or [])

    def to_python(self, value: Any) -> Any:
        try:
            return mapping.parse(value or "") if isinstance(value, str | None) else value
        except mapping.Mistakes as e:
            raise forms.ValidationError([f"Line {line}: {said}" for line, said in e.lines]) from None


class Choices(forms.MultipleChoiceField):
    widget = UnfoldAdminCheckboxSelectMultipleWidget

    def __init__(self, words: Any, **kwargs: Any) -> None:
        super().__init__(**{"required": False, "choices": [(word, word) for word in words], **kwargs})


class Variables(forms.CharField):
    """A dictionary, typed as one NAME=value a line."""

    widget = UnfoldAdminTextareaWidget

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"required": False, **kwargs})

    def prepare_value(self, value: Any) -> Any:
        return "\n".join(f"{name}={said}" for name, said in value.items()) if isinstance(value, dict) else value

    def to_python(self, value: Any) -> Any:
        if isinstance(value, dict):
            return value
        found = {}
        for line in (value or "").splitlines():
            name, equals, said = line.strip().partition("=")
            if not name:
                continue
            if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise forms.ValidationError(f"{line.strip()[:60]!r} is not NAME=value.")
            found[name] = said
        return found


def known_backends(aliases: list[str]) -> list[str]:
    """Raises ValidationError for an alias that is not configured."""
    known = backends.aliases()
    for alias in aliases:
        if alias not in known:
            raise forms.ValidationError(f"There is no backend {alias!r}; there are {', '.join(known)}.")
    return aliases


def backend_choices(empty: str | None = None) -> list[tuple[str, str]]:
    return ([("", empty)] if empty is not None else []) + [(alias, alias) for alias in backends.aliases()]


class AgentForm(forms.ModelForm):
    route = Names(
        help_text="Backends in order, with commas, such as: e2b, local. Empty: every configured one, in order."
    )
    languages = Choices(LANGUAGES, help_text="None ticked: every language there is.")
    tools = ToolMapping(
        label="MCP tools",
        help_text="Empty: all. Names with commas: these. A mapping in YAML also sets their texts and the limits of their arguments: "
        "docs/mcp.md, or manage.py tools --all.",
    )
    packages = Names(help_text="Packages that it may install, with commas. Empty: none. A single *: any.")
    network_allow = Names(
        label="Network",
        help_text="Hosts that its code may reach, with commas, on ports 80 and 443 unless it says another: example.org, "
        "*.example.org, example.org:8443, 10.1.2.0/24. Empty: no network. A single *: every public address.",
    )

    keep_files = KeptNames(
        label="Files that are kept",
        help_text="Folders and globs below /home/user, with commas: outputs, *.csv. They are kept as artifacts when a session "
        "or run ends. Empty: outputs of sessions, nothing of runs. none: nothing.",
    )

    class Meta:
        model = Agent
        fields = "__all__"  # noqa: DJ007

    def clean_route(self) -> list[str]:
        return known_backends(self.cleaned_data["route"])

    def clean_packages(self) -> list[str]:
        for package in self.cleaned_data["packages"]:
            if package == "*":
                continue
            try:
                if packages.name_of(package) and re.search(r"[=<>!~\[]", package):
                    raise forms.ValidationError(f"{package!r}: the name alone, any version of it may be installed.")
            except Invalid:
                raise forms.ValidationError(f"{package!r} is not the name of a package.") from None
        return self.cleaned_data["packages"]

    def clean(self) -> dict[str, Any]:
        data = super().clean() or self.cleaned_data
        if (data.get("timeout_seconds") or 1) > (data.get("timeout_max_seconds") or LARGEST):
            self.add_error("timeout_max_seconds", "The most is below the default: raise it, or lower the default.")
        return data


class TemplateForm(forms.ModelForm):
    languages = Choices(LANGUAGES, help_text="What is ready in it.")
    env = Variables(help_text="One NAME=value a line, for every sandbox. Never secrets: they are stored as they are.")
    packages = Lines(help_text="One requirement a line, such as emoji>=2, beside the shipped ones; wheels only.")
    files = forms.JSONField(  # type: ignore[assignment]
        required=False,
        initial=dict,
        widget=UnfoldAdminTextareaWidget,
        help_text='What every fresh sandbox finds: {"path": "text"}; relative paths begin at /home/user.',
    )

    class Meta:
        model = Template
        fields = "__all__"  # noqa: DJ007

    def clean(self) -> dict[str, Any]:
        data = super().clean() or self.cleaned_data
        data["files"] = data.get("files") or {}
        named = Template(**{name: data[name] for name in ("packages", "files") if name in data})
        for field, why in operations.mistakes(named).items():
            self.add_error(field, why)
        return data


class TeamForm(forms.ModelForm):
    time_zone = forms.ChoiceField(
        choices=lambda: [(zone, zone) for zone in sorted(available_timezones())],
        widget=UnfoldAdminSelectWidget,
        initial="UTC",
        help_text="Where its days and months begin: quotas and budgets reset there.",
    )

    class Meta:
        model = Team
        fields = "__all__"  # noqa: DJ007


STEPS = {Unit.NANO_USD: costs.NANO, Unit.COMPUTE_US: 1_000_000}  # of what is counted in one of what is typed

OPTIONAL = {"soft_percent", "when_exhausted", "max_wait_seconds"}  # left empty they stay as they are
CHOSEN_ONCE = {"unit", "window", "each", "team", "agent", "key", "user", "workflow", "backend"}


class QuotaForm(forms.ModelForm):
    """Whose it is, what it counts and over which time are chosen once: what is reserved hangs on them."""

    limit = forms.DecimalField(
        min_value=0,
        max_digits=19,
        decimal_places=9,
        widget=UnfoldAdminDecimalFieldWidget,
        help_text="Dollars for a budget (5 is $5), seconds for compute time, a count for everything else.",
    )
    raised_by = forms.DecimalField(
        min_value=0,
        max_digits=19,
        decimal_places=9,
        required=False,
        initial=0,
        widget=UnfoldAdminDecimalFieldWidget,
        help_text="On top of the limit, in its unit, until the moment below.",
    )

    class Meta:
        model = Quota
        fields = "__all__"  # noqa: DJ007

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "unit" in self.fields:
            words = {Unit.NANO_USD: "Money (a budget)"}
            self.fields["unit"].choices = [(unit, words.get(unit, unit.label.capitalize())) for unit in Unit]  # type: ignore[attr-defined]
        for name in OPTIONAL & self.fields.keys():
            self.fields[name].required = False
        if self.instance.pk:
            for name in CHOSEN_ONCE & self.fields.keys():
                self.fields[name].disabled = True
            one = STEPS.get(self.instance.unit, 1)
            for name in ("limit", "raised_by"):
                self.initial[name] = format((Decimal(getattr(self.instance, name)) / one).normalize(), "f")

    def clean(self) -> dict[str, Any]:
        data = super().clean() or self.cleaned_data
        for name in OPTIONAL & data.keys():
            data[name] = getattr(self.instance, name) if data[name] in (None, "") else data[name]
        unit = data.get("unit")
        if unit is None:
            return data
        for name in ("limit", "raised_by"):
            given = data.get(name) if name != "raised_by" else data.get(name) or Decimal(0)
            if given is None:
                continue
            amount = given * STEPS.get(unit, 1)
            if amount != amount.to_integral_value():
                self.add_error(name, "A whole number, please: only a budget and compute time have decimals.")
            elif amount > LARGEST:
                self.add_error(name, "That is more than can be counted.")
            else:
                data[name] = int(amount)
        if data.get("raised_by") and not data.get("raised_until"):
            self.add_error("raised_until", "A raise ends: say when.")
        if data.get("raised_by") and not data.get("raised_why"):
            self.add_error("raised_why", "Who wanted it, and for what: whoever reads the audit later asks.")
        if unit in (*CONCURRENT, Unit.BYTES_STORED) and data.get("window") != Window.TOTAL:
            self.add_error("window", "What is there at the same time has no window: choose total.")
        if unit in (Unit.CONCURRENT_SANDBOXES, Unit.COMPUTE_US, Unit.BYTES_STORED):
            for name in ("user", "workflow"):
                if data.get(name) or (name == "user" and data.get("each") == Quota.USER):
                    self.add_error(name, f"{unit.capitalize().replace('_', ' ')} are not known by {name}.")
        if data.get("each") == Quota.USER and data.get("user"):
            self.add_error("user", "It holds for each end user: leave this empty.")
        if data.get("each") == Quota.AGENT and (data.get("agent") or data.get("key")):
            self.add_error("each", "Each agent of whom: choose a team, or none for every team.")
        if sum(data.get(scope) is not None for scope in ("team", "agent", "key")) > 1:
            self.add_error(None, "A quota belongs to one team, one agent or one key; with none of them, to everybody.")
        return data


class KeyForm(forms.ModelForm):
    scopes = Choices(Scope.values, required=True, initial=[Scope.RUN, Scope.READ], help_text="What it may do.")
    backend = forms.ChoiceField(
        required=False,
        choices=lambda: backend_choices("any, by the agent's route"),
        widget=UnfoldAdminSelectWidget,
        help_text="Bound to one backend: scripted makes a test key that costs nothing.",
    )
    allow_from = Names(
        label="Networks",
        help_text="Addresses that it may be sent from, with commas: 10.0.0.0/8, 192.0.2.7. Empty: any.",
    )

    class Meta:
        model = ApiKey
        fields = "__all__"  # noqa: DJ007

    def clean(self) -> dict[str, Any]:
        data = super().clean() or self.cleaned_data
        team, agent = data.get("team"), data.get("agent")
        if team and agent and agent.team_id != team.pk:
            self.add_error("agent", f"{agent} is an agent of {agent.team}, not of {team}.")
        try:
            data["allow_from"] = network.cidrs(data.get("allow_from") or [])
        except ValueError as problem:
            self.add_error("allow_from", str(problem))
        return data


class RateForm(forms.ModelForm):
    backend = forms.ChoiceField(choices=backend_choices, widget=UnfoldAdminSelectWidget)
    nano_usd = forms.DecimalField(
        label="Dollars a second",
        min_value=0,
        max_digits=19,
        decimal_places=9,
        widget=UnfoldAdminDecimalFieldWidget,
        help_text="Of one vCPU, or of one GiB of memory: 0.000014 is $0.05 an hour.",
    )

    class Meta:
        model = Rate
        fields = "__all__"  # noqa: DJ007

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.instance.pk:
            self.initial["nano_usd"] = f"{Decimal(self.instance.nano_usd) / costs.NANO:f}"
            if self.instance.backend not in backends.aliases():  # a price of a backend that is not configured now
                alias = self.instance.backend
                self.fields["backend"].choices = [(alias, alias), *backend_choices()]  # type: ignore[attr-defined]

    def clean_nano_usd(self) -> int:
        return int(self.cleaned_data["nano_usd"] * costs.NANO)

    def clean(self) -> dict[str, Any]:
        data = super().clean() or self.cleaned_data
        if data.get("valid_to") and data.get("valid_from") and data["valid_to"] <= data["valid_from"]:
            self.add_error("valid_to", "It would end before it begins.")
        return data
