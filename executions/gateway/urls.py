from django.urls import path

from executions.gateway import control

urlpatterns = [
    path("sandboxes", control.sandboxes_v1),
    path("v2/sandboxes", control.sandboxes_v2),
    path("sandboxes/<str:sandbox_id>", control.sandbox),
    path("sandboxes/<str:sandbox_id>/connect", control.connections),
    path("v2/sandboxes/<str:sandbox_id>/connect", control.connections),
    path("sandboxes/<str:sandbox_id>/timeout", control.timeouts),
    path("sandboxes/<str:sandbox_id>/pause", control.pauses),
    path("sandboxes/<str:sandbox_id>/<path:rest>", control.not_yet),
    path("<path:rest>", control.nothing),
]
