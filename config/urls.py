from django.urls import include, path

urlpatterns = [path("", include("executions.urls"))]

handler500 = "executions.api.problems.broke"
