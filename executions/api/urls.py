from django.urls import path, re_path

from executions.api import (
    agents,
    artifacts,
    audit,
    costs,
    executions,
    files,
    forecasts,
    keys,
    lists,
    machines,
    metrics,
    openapi,
    packages,
    problems,
    reading,
    sessions,
    webhooks,
    workflows,
)
from executions.api.operation import methods, operation
from executions.serializers import InstalledShape, InstallRequest

INSTALL = operation(
    "Make packages importable",
    body=InstallRequest,
    gives={200: InstalledShape},
    fails=(202, 402, 409, 410, 422, 500, 502, 503),
)
LOCK = operation("What an agent's sandboxes import", gives={200: dict})


def docs(request):
    from drf_spectacular.views import SpectacularSwaggerSplitView  # not before somebody reads the documentation

    return SpectacularSwaggerSplitView.as_view(url_name="schema")(request)


urlpatterns = [
    path("api/v1/executions", methods(GET=lists.executions, POST=executions.create)),
    path("api/v1/executions/batch", methods(POST=workflows.run_batch)),
    path("api/v1/executions/<str:execution_id>", methods(GET=executions.detail)),
    path("api/v1/executions/<str:execution_id>/events", methods(GET=executions.events)),
    path("api/v1/executions/<str:execution_id>/cancel", methods(POST=executions.cancel)),
    path("api/v1/executions/<str:execution_id>/rerun", methods(POST=workflows.rerun)),
    path("api/v1/executions/<str:execution_id>/artifacts", methods(GET=artifacts.of_execution)),
    path("api/v1/artifacts/<str:artifact_id>", methods(GET=artifacts.content)),
    path("api/v1/sessions", methods(GET=lists.sessions, POST=sessions.create)),
    path("api/v1/sessions/<str:session_id>", methods(GET=sessions.look, DELETE=sessions.end)),
    path("api/v1/sessions/<str:session_id>/timeout", methods(POST=sessions.timeout)),
    path("api/v1/sessions/<str:session_id>/pause", methods(POST=sessions.pause)),
    path("api/v1/sessions/<str:session_id>/resume", methods(POST=sessions.resume)),
    path("api/v1/sessions/<str:session_id>/commands", methods(POST=machines.command)),
    path(
        "api/v1/sessions/<str:session_id>/contexts",
        methods(GET=machines.contexts, POST=machines.create_context),
    ),
    path("api/v1/sessions/<str:session_id>/contexts/<str:context_id>", methods(DELETE=machines.remove_context)),
    path("api/v1/sessions/<str:session_id>/contexts/<str:context_id>/restart", methods(POST=machines.restart_context)),
    path("api/v1/sessions/<str:session_id>/artifacts", methods(GET=artifacts.of_session)),
    path(
        "api/v1/sessions/<str:session_id>/files",
        methods(GET=files.read, PUT=files.write, POST=files.act, DELETE=files.remove),
    ),
    path("api/v1/sessions/<str:session_id>/packages", methods(POST=INSTALL(packages.of_session))),
    path("api/v1/sandboxes", methods(GET=lists.sandboxes)),
    path("api/v1/sandboxes/<str:sandbox_id>", methods(GET=machines.look, DELETE=machines.kill)),
    path("api/v1/workflows/<path:workflow>/cancel", methods(POST=workflows.cancel)),
    path("api/v1/workflows/<path:workflow>", methods(GET=workflows.look, DELETE=workflows.end)),
    path("api/v1/agents", methods(GET=agents.every, POST=agents.create)),
    path(
        "api/v1/agents/<str:agent_id>",
        methods(GET=agents.look, PATCH=agents.change, DELETE=agents.switch_off),
    ),
    path(
        "api/v1/agents/<str:agent_id>/packages",
        methods(GET=LOCK(packages.of_agent), POST=INSTALL(packages.of_agent)),
    ),
    path("api/v1/keys", methods(GET=keys.every, POST=keys.create)),
    path("api/v1/keys/<str:key_id>", methods(GET=keys.look, DELETE=keys.revoke)),
    path("api/v1/keys/<str:key_id>/rotate", methods(POST=keys.rotate)),
    path("api/v1/webhooks", methods(GET=webhooks.every, POST=webhooks.create)),
    path(
        "api/v1/webhooks/<str:webhook_id>",
        methods(GET=webhooks.look, PATCH=webhooks.change, DELETE=webhooks.remove),
    ),
    path("api/v1/webhooks/<str:webhook_id>/test", methods(POST=webhooks.send_test)),
    path("api/v1/webhooks/<str:webhook_id>/rotate", methods(POST=webhooks.rotate)),
    path("api/v1/webhooks/<str:webhook_id>/deliveries", methods(GET=webhooks.deliveries)),
    path("api/v1/webhooks/<str:webhook_id>/deliveries/<str:delivery_id>/resend", methods(POST=webhooks.resend)),
    path("api/v1/templates", methods(GET=reading.templates)),
    path("api/v1/backends", methods(GET=reading.backends)),
    path("api/v1/environment", methods(GET=reading.environment)),
    path("api/v1/limits", methods(GET=reading.limits)),
    path("api/v1/refusals", methods(GET=reading.refusals)),
    path("api/v1/audit", methods(GET=audit.events)),
    path("api/v1/costs", methods(GET=costs.costs)),
    path("api/v1/costs/forecast", methods(GET=forecasts.forecast)),
    path("api/v1/costs/what-if", methods(GET=forecasts.what_if)),
    path("api/v1/costs/bills", methods(GET=forecasts.bill)),
    path("api/v1/usage", methods(GET=costs.usage)),
    path("healthz", reading.healthz),
    path("readyz", reading.readyz),
    path("metrics", metrics.metrics),
    path("api/schema", openapi.schema, name="schema"),
    path("api/docs", docs, name="docs"),
    re_path(r"^api/v1/[\s\S]*$", problems.not_found),  # with line breaks, too; of (?s:…) Django makes no address
]
