from django.db import migrations, models


def forget(apps, schema_editor):
    """What is known of backends is known again within seconds; a row of before would stand for no machine."""
    apps.get_model("executions", "BackendState").objects.all().delete()


class Migration(migrations.Migration):
    dependencies = [
        ("executions", "0019_webhooks"),
    ]

    operations = [
        migrations.RunPython(forget, migrations.RunPython.noop, elidable=True),
        migrations.AlterField(
            model_name="backendstate",
            name="alias",
            field=models.CharField(
                help_text="`alias@machine` where sandboxes live on one machine each.",
                max_length=110,
                primary_key=True,
                serialize=False,
            ),
        ),
    ]
