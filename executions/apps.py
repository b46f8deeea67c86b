from django.apps import AppConfig


class ExecutionsConfig(AppConfig):
    name = "executions"
    verbose_name = "Sandgate"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from executions import checks, sign_ins  # noqa: F401  (registers them)
