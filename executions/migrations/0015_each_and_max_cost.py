from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ("executions", "0015_nodes"),
    ]

    operations = [
        migrations.AddField(
            model_name="execution",
            name="max_cost_nano_usd",
            field=models.BigIntegerField(blank=True, help_text="The most that it may cost.", null=True),
        ),
        migrations.AddField(
            model_name="quota",
            name="each",
            field=models.CharField(
                blank=True,
                choices=[("user", "each end user"), ("agent", "each agent")],
                help_text="The limit is that of every one of them separately.",
                max_length=5,
                default="",
            ),
            preserve_default=False,
        ),
        migrations.AddField(
            model_name="quota",
            name="parent",
            field=models.ForeignKey(
                blank=True,
                editable=False,
                null=True,
                on_delete=models.deletion.CASCADE,
                related_name="children",
                to="executions.quota",
            ),
        ),
        migrations.AddField(
            model_name="quota",
            name="of_whom",
            field=models.CharField(
                blank=True, editable=False, help_text="Which one of `each` it is for.", max_length=250, default=""
            ),
            preserve_default=False,
        ),
        migrations.AlterField(
            model_name="ledgerentry",
            name="quota",
            field=models.ForeignKey(
                db_index=False,
                null=True,
                on_delete=models.deletion.SET_NULL,
                related_name="entries",
                to="executions.quota",
            ),
        ),
        migrations.AddIndex(
            model_name="ledgerentry",
            index=models.Index(fields=["quota", "at"], name="ledger_of_quota"),
        ),
        migrations.AddConstraint(
            model_name="quota",
            constraint=models.UniqueConstraint(
                condition=models.Q(("parent__isnull", False)),
                fields=("parent", "of_whom"),
                name="quota_once_of_each",
            ),
        ),
        migrations.AddConstraint(
            model_name="quota",
            constraint=models.CheckConstraint(
                condition=models.Q(
                    ("each", ""),
                    models.Q(("agent", None), ("each", "agent"), ("key", None)),
                    models.Q(
                        ("each", "user"),
                        ("unit__in", ["executions", "concurrent_executions", "creations", "nano_usd"]),
                        ("user", ""),
                    ),
                    _connector="OR",
                ),
                name="quota_each_told_apart",
            ),
        ),
    ]
