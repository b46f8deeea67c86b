from django.urls import include, path

urlpatterns = [path("", include("executions.urls"))]
