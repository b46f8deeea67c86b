from django.urls import path

from executions.api import (
    artifacts,
    audit,
    costs,
    executions,
    forecasts,
    metrics,
    packages,
    problems,
    reading,
    sessions,
)


def schema(request):
    from drf_spectacular.views import SpectacularAPIView  # not before somebody reads the documentation

    return SpectacularAPIView.as_view()(request)


def docs(request):
    from drf_spectacular.views import SpectacularSwaggerSplitView

    return SpectacularSwaggerSplitView.as_view(url_name="schema")(request)


urlpatterns = [
    path("api/v1/executions", executions.collection),
    path("api/v1/executions/<str:execution_id>", executions.detail),
    path("api/v1/executions/<str:execution_id>/events", executions.events),
    path("api/v1/executions/<str:execution_id>/cancel", executions.cancel),
    path("api/v1/executions/<str:execution_id>/artifacts", artifacts.of_execution),
    path("api/v1/artifacts/<str:artifact_id>", artifacts.content),
    path("api/v1/sessions", sessions.collection),
    path("api/v1/sessions/<str:session_id>", sessions.detail),
    path("api/v1/sessions/<str:session_id>/timeout", sessions.timeout),
    path("api/v1/sessions/<str:session_id>/pause", sessions.pause),
    path("api/v1/sessions/<str:session_id>/resume", sessions.resume),
    path("api/v1/sessions/<str:session_id>/artifacts", artifacts.of_session),
    path("api/v1/sessions/<str:session_id>/files", sessions.files),
    path("api/v1/sessions/<str:session_id>/packages", packages.of_session),
    path("api/v1/agents/<str:agent_id>/packages", packages.of_agent),
    path("api/v1/templates", reading.templates),
    path("api/v1/backends", reading.backends),
    path("api/v1/environment", reading.environment),
    path("api/v1/limits", reading.limits),
    path("api/v1/refusals", reading.refusals),
    path("api/v1/audit", audit.events),
    path("api/v1/costs", costs.costs),
    path("api/v1/costs/forecast", forecasts.forecast),
    path("api/v1/costs/what-if", forecasts.what_if),
    path("api/v1/costs/bills", forecasts.bill),
    path("api/v1/usage", costs.usage),
    path("healthz", reading.healthz),
    path("readyz", reading.readyz),
    path("metrics", metrics.metrics),
    path("api/schema", schema, name="schema"),
    path("api/docs", docs, name="docs"),
    path("api/v1/<path:rest>", problems.not_found),
]
