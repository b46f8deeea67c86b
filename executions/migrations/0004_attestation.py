import django.utils.timezone
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("executions", "0003_execution_limits"),
    ]

    operations = [
        migrations.CreateModel(
            name="Attestation",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("backend", models.CharField(max_length=40)),
                ("isolation", models.CharField(blank=True, max_length=12)),
                (
                    "walls",
                    models.JSONField(
                        default=dict, help_text="Each wall: true, or the sentence that says what is missing."
                    ),
                ),
                (
                    "cases",
                    models.JSONField(
                        default=list, help_text="Each attack: group, case, wall, verdict, seen, seconds."
                    ),
                ),
                ("blocked", models.PositiveIntegerField(default=0)),
                ("open", models.PositiveIntegerField(default=0)),
                ("skipped", models.PositiveIntegerField(default=0)),
                ("took_seconds", models.FloatField(default=0)),
                ("at", models.DateTimeField(default=django.utils.timezone.now)),
            ],
            options={
                "indexes": [models.Index(fields=["backend", "-at"], name="attestation_last")],
            },
        ),
    ]
