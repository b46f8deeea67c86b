"""The machine that a local sandbox lives on."""

from __future__ import annotations

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("executions", "0014_waiting")]

    operations = [
        migrations.AddField(
            model_name="sandbox",
            name="node",
            field=models.CharField(
                blank=True,
                default="",
                editable=False,
                help_text="The machine it lives on; empty: any process reaches it.",
                max_length=60,
            ),
            preserve_default=False,
        ),
    ]
