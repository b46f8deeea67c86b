import django.utils.timezone
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("executions", "0007_files_kept"),
    ]

    operations = [
        migrations.CreateModel(
            name="MetricTotal",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("name", models.CharField(max_length=80)),
                ("labels", models.CharField(help_text="The values of its labels, in order, as JSON.", max_length=200)),
                (
                    "part",
                    models.CharField(
                        blank=True, help_text="Of a histogram: the bucket's bound, or sum.", max_length=8
                    ),
                ),
                ("value", models.FloatField(default=0)),
                ("at", models.DateTimeField(default=django.utils.timezone.now)),
            ],
            options={
                "constraints": [
                    models.UniqueConstraint(fields=("name", "labels", "part"), name="metric_total_once"),
                ],
            },
        ),
    ]
