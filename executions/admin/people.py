"""Teams, the people in them, and what staff may do."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.contrib.auth.admin import GroupAdmin, UserAdmin
from django.contrib.auth.models import Group
from django.db.models import Count, QuerySet
from django.http import HttpRequest
from django.utils.safestring import SafeString
from unfold.admin import TabularInline
from unfold.contrib.filters.admin import AutocompleteSelectFilter, BooleanRadioFilter, ChoicesDropdownFilter
from unfold.decorators import display
from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm
from unfold.views import ChangeList

from executions.admin import levers, show
from executions.admin.agents import Ceilings, NowList
from executions.admin.base import ConfigurationPage
from executions.admin.forms import TeamForm
from executions.admin.runs import is_list
from executions.models import Membership, Team, User

admin.site.unregister(Group)


class TeamCeilings(Ceilings):
    def get_queryset(self, request: HttpRequest) -> QuerySet:
        return super().get_queryset(request).filter(agent=None, key=None)


class Members(TabularInline):
    model = Membership
    extra = 0
    hide_title = True
    autocomplete_fields = ["user"]
    verbose_name_plural = "people"


class Teams(TabularInline):
    model = Membership
    extra = 0
    hide_title = True
    autocomplete_fields = ["team"]
    verbose_name_plural = "teams"


@admin.register(Team)
class TeamPage(ConfigurationPage):
    form = TeamForm
    list_display = ["name", "people", "agents_count", "running", "today", "time_zone", "age"]
    search_fields = ["name", "id__startswith"]
    ordering = ["name"]
    fieldsets = [(None, {"fields": ["name", "time_zone"]})]
    inlines = [Members, TeamCeilings]

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return NowList

    def get_queryset(self, request: HttpRequest) -> QuerySet:
        found = super().get_queryset(request)
        if not is_list(request):
            return found
        return found.annotate(
            members=Count("memberships", distinct=True),
            agents_all=Count("agents", distinct=True),
        )

    @display(description="people", ordering="members")
    def people(self, row: Any) -> SafeString:
        return show.number(row.members)

    @display(description="agents", ordering="agents_all")
    def agents_count(self, row: Any) -> SafeString:
        return show.number(row.agents_all)

    @display(description="running", ordering="open_runs")
    def running(self, row: Any) -> SafeString:
        return show.number(row.open_runs)

    @display(description="spend today", ordering="today")
    def today(self, row: Any) -> SafeString:
        return show.money(row.today)

    @display(description="age", ordering="created_at")
    def age(self, row: Team) -> Any:
        return show.when(row.created_at)


@admin.register(Membership)
class MembershipPage(ConfigurationPage):
    list_display = ["user", "team", "role"]
    list_filter = [("role", ChoicesDropdownFilter), ("team", AutocompleteSelectFilter)]
    list_select_related = ["user", "team"]
    search_fields = ["user__username", "team__name"]
    autocomplete_fields = ["user", "team"]
    ordering = ["team__name", "user__username"]


@admin.register(User)
class UserPage(UserAdmin, ConfigurationPage):  # type: ignore[misc]
    form = UserChangeForm
    add_form = UserCreationForm
    change_password_form = AdminPasswordChangeForm
    list_display = ["username", "called", "email", "in_teams", "operates", "badge", "seen"]
    list_filter = [
        ("is_active", BooleanRadioFilter),
        ("is_superuser", BooleanRadioFilter),
        ("is_staff", BooleanRadioFilter),
    ]
    ordering = ["username"]
    filter_horizontal = ()
    fieldsets = [
        (None, {"fields": ["username", "password", "is_active"]}),
        ("Who", {"fields": [("first_name", "last_name"), "email"]}),
        ("What they may do here", {"fields": ["is_superuser", "is_staff", "groups", "user_permissions"]}),
    ]
    actions_detail = ["sign_in_link"]
    sign_in_link = levers.pulls(levers.SIGN_IN)
    inlines = [Teams]

    def get_inlines(self, request: HttpRequest, obj: Any) -> Any:
        return self.inlines if obj else []

    def has_sign_in_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Whoever makes a link could become that person: superusers only."""
        return bool(request.user.is_superuser)

    def get_queryset(self, request: HttpRequest) -> QuerySet:
        found = super().get_queryset(request)
        return found.prefetch_related("memberships__team") if is_list(request) else found

    @display(description="name")
    def called(self, row: User) -> str:
        return row.get_full_name() or show.NONE

    @display(description="teams")
    def in_teams(self, row: Any) -> SafeString:
        return show.chips([f"{m.team}: {m.role}" for m in row.memberships.all()], "none")

    @display(description="admin", ordering="is_superuser")
    def operates(self, row: User) -> str:
        return "everything" if row.is_superuser else "in part" if row.is_staff else show.NONE

    @display(description="state", ordering="is_active")
    def badge(self, row: User) -> SafeString:
        return show.badge("on" if row.is_active else "off")

    @display(description="last sign-in", ordering="last_login")
    def seen(self, row: User) -> Any:
        return show.when(row.last_login)


@admin.register(Group)
class GroupPage(GroupAdmin, ConfigurationPage):  # type: ignore[misc]
    """Permissions of staff who are not superusers."""

    filter_horizontal = ()
