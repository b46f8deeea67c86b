import django.db.models.deletion
import django.utils.timezone
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("executions", "0004_attestation"),
    ]

    operations = [
        migrations.AddField(
            model_name="agent",
            name="network_allow",
            field=models.JSONField(
                blank=True,
                default=list,
                help_text='Hosts and addresses that its code may reach. Empty: none. ["*"]: every public one.',
            ),
        ),
        migrations.AddField(
            model_name="sandbox",
            name="network_allow",
            field=models.JSONField(blank=True, default=list, help_text="The rules of its network; empty: off."),
        ),
        migrations.CreateModel(
            name="Egress",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("number", models.PositiveIntegerField()),
                ("host", models.CharField(blank=True, max_length=255)),
                ("port", models.PositiveIntegerField()),
                ("address", models.CharField(blank=True, max_length=45)),
                (
                    "verdict",
                    models.CharField(
                        choices=[("allowed", "Allowed"), ("denied", "Denied"), ("failed", "Failed")], max_length=8
                    ),
                ),
                ("reason", models.CharField(blank=True, max_length=300)),
                ("bytes_out", models.BigIntegerField(default=0)),
                ("bytes_in", models.BigIntegerField(default=0)),
                ("times", models.PositiveIntegerField(default=1)),
                ("at", models.DateTimeField(default=django.utils.timezone.now)),
                (
                    "execution",
                    models.ForeignKey(
                        blank=True,
                        null=True,
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="egress",
                        to="executions.execution",
                    ),
                ),
                (
                    "sandbox",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE, related_name="egress", to="executions.sandbox"
                    ),
                ),
            ],
            options={
                "verbose_name_plural": "egress",
                "constraints": [
                    models.UniqueConstraint(fields=("sandbox", "number"), name="egress_number_once"),
                ],
            },
        ),
    ]
