from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("executions", "0020_backend_state_by_machine")]

    operations = [
        migrations.AddField(
            model_name="webhook",
            name="former_secret",
            field=models.TextField(
                blank=True, default="", editable=False, help_text="Sealed, too: signed with beside the new one."
            ),
            preserve_default=False,
        ),
        migrations.AddField(
            model_name="webhook",
            name="former_until",
            field=models.DateTimeField(editable=False, null=True),
        ),
        migrations.RemoveIndex(model_name="delivery", name="delivery_due"),
        migrations.AddIndex(
            model_name="delivery",
            index=models.Index(
                condition=models.Q(("ended_at__isnull", True)), fields=["webhook", "next_at"], name="delivery_open"
            ),
        ),
    ]
