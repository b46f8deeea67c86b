"""The OAuth server's addresses, by allauth's provider: metadata, consent, tokens, registration. Imported where SANDGATE_OAUTH is on."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

from allauth.idp.oidc import views
from allauth.idp.oidc.adapter import DefaultOIDCAdapter
from django.conf import settings
from django.core.exceptions import ValidationError
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.urls import include, path
from django.views.decorators.http import require_GET

from executions import audit
from executions.errors import Invalid
from executions.mcp import oauth
from executions.states import Scope

SCOPES = {
    Scope.RUN.value: "run code, install packages and change files, as your personal agent",
    Scope.READ.value: "read the runs, sessions and files of your personal agent",
}
GRANTS = {"authorization_code", "refresh_token"}
NEVER = {"", "javascript", "data", "file", "blob", "vbscript", "about", "http"}  # schemes that no code is sent to


class Adapter(DefaultOIDCAdapter):
    """allauth's provider with this product's scopes; IDP_OIDC_ADAPTER names it."""

    scope_display = SCOPES

    def get_issuer(self) -> str:
        return settings.PUBLIC_URL

    def validate_client_registration(self, *, client: Any, client_metadata: dict[str, Any], **kwargs: Any) -> None:
        """Raises ValidationError for what no MCP client needs; nobody registers more scopes than there are."""
        for uri in client.get_redirect_uris():
            parts = urlsplit(uri)
            loopback = parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost")
            if not loopback and parts.scheme in NEVER:
                raise ValidationError("redirect_uris: https, a loopback address, or an app's own scheme.")
        if not set(client.get_grant_types()) <= GRANTS or client.get_response_types() != ["code"]:
            raise ValidationError("Only authorization_code with refresh_token, and code, are granted here.")
        client.name = client.name or urlsplit(client.get_redirect_uris()[0]).netloc or "an unnamed client"
        client.set_scopes(list(SCOPES))
        client.set_default_scopes(list(SCOPES))


class Authorize(views.AuthorizationView):
    """Consent, for requests with PKCE alone."""

    template_name = "console/authorize.html"

    def get(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        if request.GET.get("code_challenge_method") != "S256" or not request.GET.get("code_challenge"):
            refused = Invalid("The program asks without PKCE (S256).", remedy="Use a newer version of it.")
            return render(request, "console/problem.html", {"problem": refused.problem()}, status=400)
        if request.GET.get("prompt", "consent") != "consent":
            refused = Invalid("prompt: only consent is known here.", field="prompt")
            return render(request, "console/problem.html", {"problem": refused.problem()}, status=400)
        return _may_redirect(super().get(request, *args, **kwargs), request.GET.get("redirect_uri", ""))

    def form_valid(self, form: Any) -> HttpResponse:
        response = super().form_valid(form)
        audit.record(
            "client_let_in",
            actor=self.request.user,
            subject=f"client {self._request_info['client_id']}",
            after={"scopes": form.cleaned_data["scopes"]},
            ip=self.request.META.get("REMOTE_ADDR"),
        )
        return response

    def get_context_data(self, **kwargs: Any) -> dict[str, Any]:
        goes_to = urlsplit(self._request_info["redirect_uri"])
        return super().get_context_data(**kwargs) | {"goes_to": goes_to.netloc or f"{goes_to.scheme}:"}


def _may_redirect(response: HttpResponse, uri: str) -> HttpResponse:
    """Browsers hold redirects after a form to form-action, too: the client's own address is let through on this page."""
    parts = urlsplit(uri)
    if not re.fullmatch(r"[\w.:\[\]-]*", parts.netloc):  # it becomes a part of a header
        return response
    target = f"{parts.scheme}://{parts.netloc}" if parts.scheme in ("http", "https") else f"{parts.scheme}:"
    response._csp_update = {"form-action": [target]}  # type: ignore[attr-defined]
    return response


@require_GET
def protected_resource(request: HttpRequest) -> JsonResponse:
    """RFC 9728: who gives tokens for /mcp, and for what."""
    return _public(
        {
            "resource": oauth.resource(),
            "resource_name": "Sandgate",
            "authorization_servers": [settings.PUBLIC_URL],
            "scopes_supported": list(SCOPES),
            "bearer_methods_supported": ["header"],
        }
    )


@require_GET
def authorization_server(request: HttpRequest) -> JsonResponse:
    """RFC 8414."""
    at = settings.PUBLIC_URL + "/oauth/"
    found = {
        "issuer": settings.PUBLIC_URL,
        "authorization_endpoint": at + "authorize",
        "token_endpoint": at + "token",
        "revocation_endpoint": at + "revoke",
        "scopes_supported": list(SCOPES),
        "response_types_supported": ["code"],
        "grant_types_supported": sorted(GRANTS),
        "token_endpoint_auth_methods_supported": ["none", "client_secret_basic", "client_secret_post"],
        "code_challenge_methods_supported": ["S256"],
    }
    if settings.IDP_OIDC_DCR_ENABLED:
        found["registration_endpoint"] = at + "register"
    return _public(found)


def _public(data: dict[str, Any]) -> JsonResponse:
    response = JsonResponse(data)
    response["Access-Control-Allow-Origin"] = "*"
    response["Cache-Control"] = "max-age=3600"
    return response


_endpoints = [
    path("oauth/authorize", Authorize.as_view(), name="authorization"),
    path("oauth/token", views.token, name="token"),
    path("oauth/revoke", views.revoke, name="revoke"),
]
if settings.IDP_OIDC_DCR_ENABLED:
    _endpoints.append(path("oauth/register", views.client_registration, name="client_registration"))

urlpatterns = [
    path(".well-known/oauth-protected-resource", protected_resource),
    path(oauth.METADATA.lstrip("/"), protected_resource),
    path(".well-known/oauth-authorization-server", authorization_server),
    path("", include(([path("", include((_endpoints, "oidc")))], "idp"))),  # the names that allauth looks for
]
