"""What the pages share: records that nobody changes by hand, configuration whose every change is written down."""

from __future__ import annotations

from typing import Any

from django.db.models import Model, QuerySet
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect
from unfold.admin import ModelAdmin, TabularInline
from unfold.views import ChangeList

from executions import audit, newest
from executions.admin import show
from executions.keys import Caller
from executions.models import ApiKey, Team


def caller_of(request: HttpRequest, team: Team | None) -> Caller:
    """The signed-in operator, acting on a row of `team` (none for rows of the whole installation)."""
    return Caller(
        team=team,  # type: ignore[arg-type]
        agent=None,
        person=request.user,  # type: ignore[arg-type]
        door="admin",
        ip=request.META.get("REMOTE_ADDR") or None,
        request_id=getattr(request, "id", ""),
    )


def write_down(request: HttpRequest, action: str, row: Model, **facts: Any) -> None:
    """One audit event: this operator did `action` to `row`."""
    team = None if isinstance(row, Team) and action.endswith("_deleted") else _team(row)
    audit.record(action, caller=caller_of(request, team), subject=subject(row), **facts)


def subject(row: Model) -> str:
    return row.pk if isinstance(row.pk, str) else f"{noun(type(row))} {row.pk}"


def noun(model: type[Model]) -> str:
    return "key" if model is ApiKey else str(model._meta.model_name)


def _team(row: Model) -> Team | None:
    return row if isinstance(row, Team) else getattr(row, "team", None)


class Page(ModelAdmin):
    """Defaults of every list."""

    list_per_page = 50
    list_filter_submit = True
    list_fullwidth = True
    show_full_result_count = False
    view_on_site = False

    def history_view(self, request: HttpRequest, object_id: str, extra_context: Any = None) -> HttpResponse:
        """The audit is the one history of configuration."""
        name = object_id if "_" in object_id else f"{noun(self.model)} {object_id}"
        return redirect(show.rows_of("auditevent", q=name))

    def get_actions_detail(self, request: HttpRequest, object_id: Any) -> list[Any]:
        """A row's own page offers the levers that do something to it."""
        row = self.model._base_manager.filter(pk=object_id)
        found = super().get_actions_detail(request, object_id)
        return [one for one in found if not hasattr(one.method, "lever") or one.method.lever.applies(row).exists()]

    def has_pull_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Whoever may change such rows may pull their levers, also where the rows themselves are read-only."""
        return request.user.has_perm(f"{self.opts.app_label}.change_{self.opts.model_name}")


class RecordPage(Page):
    """Rows that the product writes: to be read, never changed by hand."""

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


ID_LETTERS = 26
LISTED = 10_000  # rows of a list of history


class HistoryList(ChangeList):
    """The newest rows of a table that grows with every run; filters, searches and sorting look at no others.

    What an index leads to is found however old it is: by a whole id, or what is open.
    """

    def get_queryset(self, request: HttpRequest, exclude_parameters: Any = None) -> QuerySet:
        found = super().get_queryset(request, exclude_parameters)
        if named(self.query):
            return found
        if self.params.get("open") in ("yes", "stuck"):
            return found if request.GET.get("o") else found.order_by(*newest.SORTED)
        return found.filter(**self.model_admin.newest(request))


class HistoryPage(RecordPage):
    """Records of every run."""

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return HistoryList

    def newest(self, request: HttpRequest) -> dict[str, Any]:
        """The condition that only the newest LISTED rows meet."""
        edge = self.model._base_manager.order_by("-pk").values_list("pk", flat=True)[LISTED:].first()
        return {} if edge is None else {"pk__gt": edge}

    def get_search_results(self, request: HttpRequest, queryset: QuerySet, search_term: str) -> tuple[QuerySet, bool]:
        own = {field.name for field in self.opts.concrete_fields if field.is_relation or field.primary_key}
        if (name := named(search_term)) and self.opts.model_name == name:
            return queryset.filter(pk=search_term.strip()), False
        if name and name in own:
            return queryset.filter(**{name: search_term.strip()}), False
        return super().get_search_results(request, queryset, search_term)


def named(text: str) -> str:
    """Which kind of row the text is the whole id of: "execution" or "sandbox"; else nothing."""
    prefix, _, rest = text.strip().partition("_")
    return {"exe": "execution", "sbx": "sandbox"}.get(prefix, "") if len(rest) == ID_LETTERS and rest.isalnum() else ""


class ConfigurationPage(Page):
    """Rows that operators own; each change is an AuditEvent with before and after, and Django's own log stays empty."""

    def get_object(self, request: HttpRequest, object_id: str, from_field: str | None = None) -> Any:
        row = super().get_object(request, object_id, from_field)
        if row is not None and request.method == "POST":
            request.before = audit.facts(row)  # type: ignore[attr-defined]
        return row

    def log_addition(self, request: HttpRequest, obj: Any, message: Any) -> None:
        write_down(request, f"{noun(type(obj))}_made", obj, after=audit.difference({}, audit.facts(obj))[1])

    def log_change(self, request: HttpRequest, obj: Any, message: Any) -> None:
        stored = type(obj)._base_manager.get(pk=obj.pk)
        before, after = audit.difference(request.before, audit.facts(stored))  # type: ignore[attr-defined]
        if before or after:
            write_down(request, f"{noun(type(obj))}_changed", obj, before=before, after=after)

    def log_deletions(self, request: HttpRequest, queryset: Any) -> None:
        for row in queryset:
            write_down(request, f"{noun(type(row))}_deleted", row, before=audit.difference({}, audit.facts(row))[1])

    def save_formset(self, request: HttpRequest, form: Any, formset: Any, change: bool) -> None:
        name = noun(formset.model)
        held = formset.model._base_manager.in_bulk([f.instance.pk for f in formset.initial_forms if f.instance.pk])
        told = {pk: audit.facts(row) for pk, row in held.items()}
        for doomed in formset.deleted_forms if formset.can_delete else []:
            if row := held.get(doomed.instance.pk):
                write_down(request, f"{name}_deleted", row, before=audit.difference({}, told[row.pk])[1])
        super().save_formset(request, form, formset, change)
        for row in formset.new_objects:
            write_down(request, f"{name}_made", row, after=audit.difference({}, audit.facts(row))[1])
        for row, _ in formset.changed_objects:
            before, after = audit.difference(told[row.pk], audit.facts(row))
            if before or after:
                write_down(request, f"{name}_changed", row, before=before, after=after)


class RecordInline(TabularInline):
    """Rows shown on another row's page."""

    extra = 0
    can_delete = False

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False
