"""The door of operators: live monitoring, costs, configuration with its audit, and levers."""

from django.contrib import admin

from executions.admin import machines, money, people, records, runs

admin.site.index_title = "Overview"

__all__ = ["machines", "money", "people", "records", "runs"]
