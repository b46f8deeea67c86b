"""Lists that have pages: executions, sessions and sandboxes, newest first, filtered by what stands in the query."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import django_filters
from django.db.models import Q, QuerySet, TextField
from django.db.models.fields.json import KeyTextTransform
from django.db.models.functions import Cast
from django.http import HttpRequest, HttpResponse
from pydantic import BaseModel
from rest_framework.generics import ListAPIView

from executions.api.operation import Many, View, operation
from executions.api.pages import Pages, known_query, shaped
from executions.errors import Invalid
from executions.hop import rows
from executions.keys import Caller
from executions.models import Execution, Sandbox
from executions.operations import machines
from executions.serializers import ExecutionShape, SessionShape, execution_head, session_shape
from executions.serializers.machines import SandboxShape, sandbox_shape
from executions.states import ExecutionState, SandboxState

METADATA = "metadata."  # metadata.name=value
PAGES: dict[str, dict[str, Any]] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": Pages.max_page_size, "default": Pages.page_size},
    "cursor": {"type": "string", "description": "From `next` of the page before."},
}


class ExecutionFilter(django_filters.FilterSet):
    q = django_filters.CharFilter(method="text", label="Text in the code, or in what went wrong.")
    state = django_filters.ChoiceFilter(choices=ExecutionState.choices)
    open = django_filters.BooleanFilter(field_name="ended_at", lookup_expr="isnull", label="Whether it has not ended.")
    agent = django_filters.CharFilter(field_name="agent__name")
    session = django_filters.CharFilter(field_name="sandbox_id")
    parent = django_filters.CharFilter(field_name="parent_id")
    created_after = django_filters.IsoDateTimeFilter(field_name="created_at", lookup_expr="gte")
    created_before = django_filters.IsoDateTimeFilter(field_name="created_at", lookup_expr="lt")

    class Meta:
        model = Execution
        fields = ["user", "workflow", "step", "language", "backend", "trace_id", "error_code"]

    def text(self, found: QuerySet, name: str, value: str) -> QuerySet:
        return found.filter(Q(code__icontains=value) | Q(error_value__icontains=value) | Q(error_name__icontains=value))


class SessionFilter(django_filters.FilterSet):
    open = django_filters.BooleanFilter(field_name="ended_at", lookup_expr="isnull", label="Whether it has not ended.")
    state = django_filters.ChoiceFilter(choices=SandboxState.choices)
    agent = django_filters.CharFilter(field_name="agent__name")

    class Meta:
        model = Sandbox
        fields = ["name", "backend"]


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
            case django_filters.IsoDateTimeFilter():
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


def _view(
    summary: str,
    shape: type[BaseModel],
    shown: Callable[[Any], BaseModel],
    filters: type[django_filters.FilterSet],
    of: Callable[[Caller], QuerySet],
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
            found = of(self.request.auth)  # type: ignore[arg-type]
            for n, name in enumerate(name for name in request.GET if metadata and name.startswith(METADATA)):
                value = Cast(KeyTextTransform(name.removeprefix(METADATA), "metadata"), TextField())
                found = found.alias(**{f"metadata_{n}": value})
                found = found.filter(**{f"metadata_{n}": request.GET[name]})
            return found

    answer = List.as_view()

    async def every(request: HttpRequest) -> HttpResponse:
        return await rows(answer, request)

    return operation(summary, gives={200: Many(shape, paged=True)}, query=parameters(filters, metadata=metadata))(every)


def _executions(caller: Caller) -> QuerySet:
    found = Execution.objects.filter(team=caller.team).select_related("agent", "sandbox", "actor")
    return found.filter(agent=caller.key.agent_id) if caller.key is not None and caller.key.agent_id else found


executions = _view(
    "List executions, newest first", ExecutionShape, execution_head, ExecutionFilter, _executions, metadata=True
)
sessions = _view(
    "List sessions, newest first",
    SessionShape,
    session_shape,
    SessionFilter,
    lambda caller: machines.sandboxes_of(caller).filter(kept=True),
    metadata=True,
)
sandboxes = _view("List sandboxes, newest first", SandboxShape, sandbox_shape, SandboxFilter, machines.sandboxes_of)
