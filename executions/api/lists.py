"""Lists that have pages: executions, sessions and sandboxes, newest first, filtered by what stands in the query.

Each is read through one index, which is chosen here, so that a page costs the same with a million rows.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from datetime import UTC
from typing import Any

import django_filters
from django.core.exceptions import ValidationError
from django.db.models import Q, QuerySet, TextField
from django.db.models.fields.json import KeyTextTransform
from django.db.models.functions import Cast
from django.http import HttpRequest, HttpResponse, QueryDict
from pydantic import BaseModel
from rest_framework.generics import ListAPIView

from executions import newest
from executions.api.operation import Many, View, operation
from executions.api.pages import Pages, known_query, shaped
from executions.errors import Invalid
from executions.hop import rows
from executions.keys import Caller
from executions.models import Agent, Execution, Sandbox
from executions.serializers import ExecutionShape, SessionShape, execution_head, session_shape
from executions.serializers.machines import SandboxShape, sandbox_shape
from executions.states import EXECUTION_ENDED, SANDBOX_ENDED, ExecutionState, SandboxState

TIMES = ("created_after", "created_before")
TRUE = ("true", "True", "2")  # as the filter reads it
METADATA = "metadata."  # metadata.name=value
PAGES: dict[str, dict[str, Any]] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": Pages.max_page_size, "default": Pages.page_size},
    "cursor": {"type": "string", "description": "From `next` of the page before."},
}


class MomentField(django_filters.fields.IsoDateTimeField):
    def to_python(self, value: Any) -> Any:
        moment = super().to_python(value)
        try:
            return moment and moment.astimezone(UTC)
        except OverflowError:
            raise ValidationError("It lies before the first year or behind the last one.") from None


class Moment(django_filters.IsoDateTimeFilter):
    field_class = MomentField


class ExecutionFilter(django_filters.FilterSet):
    q = django_filters.CharFilter(method="text", label="Text in the code, or in what went wrong.")
    state = django_filters.ChoiceFilter(choices=ExecutionState.choices)
    open = django_filters.BooleanFilter(field_name="ended_at", lookup_expr="isnull", label="Whether it has not ended.")
    agent = django_filters.CharFilter(method="chosen_already")
    session = django_filters.CharFilter(field_name="sandbox_id")
    parent = django_filters.CharFilter(field_name="parent_id")
    created_after = Moment(field_name="created_at", lookup_expr="gte")
    created_before = Moment(field_name="created_at", lookup_expr="lt")

    class Meta:
        model = Execution
        fields = ["user", "workflow", "step", "language", "backend", "trace_id", "error_code"]

    def chosen_already(self, found: QuerySet, name: str, value: str) -> QuerySet:
        return found

    def text(self, found: QuerySet, name: str, value: str) -> QuerySet:
        return found.filter(Q(code__icontains=value) | Q(error_value__icontains=value) | Q(error_name__icontains=value))


class SessionFilter(django_filters.FilterSet):
    open = django_filters.BooleanFilter(field_name="ended_at", lookup_expr="isnull", label="Whether it has not ended.")
    state = django_filters.ChoiceFilter(choices=SandboxState.choices)
    agent = django_filters.CharFilter(method="chosen_already")

    class Meta:
        model = Sandbox
        fields = ["name", "backend"]

    def chosen_already(self, found: QuerySet, name: str, value: str) -> QuerySet:
        return found


class SandboxFilter(SessionFilter):
    class Meta:
        model = Sandbox
        fields = ["backend", "end_reason"]


def parameters(filters: type[django_filters.FilterSet], *, metadata: bool = False) -> dict[str, dict[str, Any]]:
    """What the schema says of a list's query."""
    found: dict[str, dict[str, Any]] = {}
    for name, one in filters.base_filters.items():
        match one:
            case django_filters.BooleanFilter():
                kind: dict[str, Any] = {"type": "boolean"}
            case Moment():
                kind = {"type": "string", "format": "date-time"}
            case django_filters.ChoiceFilter():
                kind = {"type": "string", "enum": [value for value, _ in one.extra["choices"]]}
            case _:
                kind = {"type": "string"}
        described = one.label if one._label else ""
        found[name] = kind | ({"description": described} if described else {})
    if metadata:
        found["metadata.{name}"] = {"type": "string", "description": "The value that the metadata have under the name."}
    return {**found, **PAGES}


@dataclass(frozen=True, slots=True)
class Listed:
    """The rows of a list as one index gives them: in order, or the few that are open. `whose` says which are the caller's."""

    of: QuerySet
    whose: dict[str, str]
    few: bool = False


def _view(
    summary: str,
    shape: type[BaseModel],
    shown: Callable[[Any], BaseModel],
    filters: type[django_filters.FilterSet],
    listed: Callable[[Caller, QueryDict], Listed],
    *,
    metadata: bool = False,
) -> View:
    class List(ListAPIView):
        serializer_class = shaped(shown)
        filterset_class = filters

        def get_queryset(self) -> QuerySet:
            request = self.request._request
            known_query(request, {*filters.base_filters, *PAGES}, METADATA if metadata else "")
            for name in request.GET:
                if "\x00" in name + request.GET[name]:  # PostgreSQL takes none
                    raise Invalid(f"{name[:50]}: a NUL cannot be part of it.", field=name[:50])
            self.listed = listed(self.request.auth, request.GET)  # type: ignore[arg-type]
            found = newest.also(self.listed.of, **self.listed.whose)
            for n, name in enumerate(name for name in request.GET if metadata and name.startswith(METADATA)):
                value = Cast(KeyTextTransform(name.removeprefix(METADATA), "metadata"), TextField())
                found = found.alias(**{f"metadata_{n}": value})
                found = found.filter(**{f"metadata_{n}": request.GET[name]})
            return found

        def read(self, found: QuerySet, size: int, after: newest.Place | None) -> tuple[list[Any], newest.Place | None]:
            if self.listed.few:
                return newest.few(found, size, after=after)
            times = {name: self.request.GET[name] for name in TIMES if name in self.request.GET}
            return newest.page(found, size, of=filters(times, self.listed.of).qs, after=after)

    answer = List.as_view()

    async def every(request: HttpRequest) -> HttpResponse:
        return await rows(answer, request)

    return operation(summary, gives={200: Many(shape, paged=True)}, query=parameters(filters, metadata=metadata))(every)


def _executions(caller: Caller, asked: QueryDict) -> Listed:
    whose = _whose(caller, asked)
    every = Execution.objects.select_related("agent", "sandbox", "actor").defer("env", "files", "wish")
    if whose is None:
        return Listed(every.none(), {})
    owner = {"agent_id": whose["agent_id"]} if "agent_id" in whose else whose
    if session := asked.get("session"):
        there = Sandbox.objects.filter(pk=session, team=caller.team).exists()
        return Listed(every.filter(sandbox=session) if there else every.none(), whose)
    if parent := asked.get("parent"):
        return Listed(every.filter(parent=parent), whose, few=True)
    if _open(asked, EXECUTION_ENDED):
        return Listed(every.filter(ended_at__isnull=True, **owner), whose, few=True)
    if workflow := asked.get("workflow"):
        return Listed(every.filter(newest.Labelled("workflow"), team=caller.team, workflow=workflow), whose)
    return Listed(every.filter(**owner), whose)


def _sandboxes(caller: Caller, asked: QueryDict) -> Listed:
    whose = _whose(caller, asked)
    every = Sandbox.objects.select_related("agent", "template")
    if whose is None:
        return Listed(every.none(), {})
    owner = {"agent_id": whose["agent_id"]} if "agent_id" in whose else whose
    if caller.key is not None and caller.key.backend:
        whose |= {"backend": caller.key.backend}
    if _open(asked, SANDBOX_ENDED):
        return Listed(every.filter(ended_at__isnull=True, **owner), whose, few=True)
    return Listed(every.filter(team=caller.team), whose)


def _sessions(caller: Caller, asked: QueryDict) -> Listed:
    found = _sandboxes(caller, asked)
    return replace(found, of=found.of.filter(kept=True))


def _whose(caller: Caller, asked: QueryDict) -> dict[str, str] | None:
    """Which rows are the caller's, and the agent's that is asked for; None where it is none of theirs."""
    own = caller.key.agent_id if caller.key is not None else None
    agent = own
    if name := asked.get("agent"):
        agent = Agent.objects.filter(team=caller.team, name=name).values_list("pk", flat=True).first()
        if agent is None or own not in (None, agent):
            return None
    return {"team_id": caller.team.pk} | ({"agent_id": agent} if agent else {})


def _open(asked: QueryDict, ended: Container[str]) -> bool:
    """Whether only rows that have not ended can match."""
    state = asked.get("state")
    return asked.get("open") in TRUE or bool(state and state not in ended)


executions = _view(
    "List executions, newest first", ExecutionShape, execution_head, ExecutionFilter, _executions, metadata=True
)
sessions = _view("List sessions, newest first", SessionShape, session_shape, SessionFilter, _sessions, metadata=True)
sandboxes = _view("List sandboxes, newest first", SandboxShape, sandbox_shape, SandboxFilter, _sandboxes)
