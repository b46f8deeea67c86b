"""The console's addresses, its sockets too."""

from __future__ import annotations

from django.urls import path

from executions.console import acts, consumers, files, pages, sign_in

urlpatterns = [
    path("", pages.sessions),
    path("sessions", acts.start_session),
    path("sessions/<str:session_id>", pages.session),
    path("sessions/<str:session_id>/end", acts.end_session),
    path("sessions/<str:session_id>/pause", acts.pause_session),
    path("sessions/<str:session_id>/resume", acts.resume_session),
    path("sessions/<str:session_id>/files", files.files),
    path("sessions/<str:session_id>/files/download", files.download),
    path("sessions/<str:session_id>/packages", files.packages),
    path("artifacts/<str:artifact_id>", files.artifact),
    path("runs", pages.runs),
    path("runs/<str:execution_id>", pages.run),
    path("runs/<str:execution_id>/output.txt", pages.output),
    path("runs/<str:execution_id>/frames/<int:seq>", pages.frame),
    path("runs/<str:execution_id>/cancel", acts.cancel_run),
    path("runs/<str:execution_id>/rerun", acts.rerun),
    path("usage", pages.usage),
    path("keys", acts.api_keys),
    path("keys/<str:key_id>/revoke", acts.revoke_key),
    path("sign-in", sign_in.how),
    path("sign-in/<str:token>", sign_in.redeem),
    path("sign-out", sign_in.out),
]

websocket_urlpatterns = [
    path("ws/sessions/<str:session_id>", consumers.SessionSocket.as_asgi()),
    path("ws/executions/<str:execution_id>", consumers.ExecutionSocket.as_asgi()),
]
