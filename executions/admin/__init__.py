"""The door of operators: live monitoring, costs, configuration with its audit, and levers."""

from django.contrib import admin

from executions.admin import agents, machines, money, network, packages, people, pools, records, runs, webhooks

admin.site.index_title = "Overview"

__all__ = ["agents", "machines", "money", "network", "packages", "people", "pools", "records", "runs", "webhooks"]
