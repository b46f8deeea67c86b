from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ("executions", "0017_answers_and_addresses"),
    ]

    operations = [
        migrations.AlterField(
            model_name="ledgerentry",
            name="quota",
            field=models.ForeignKey(
                db_constraint=False,
                db_index=False,
                null=True,
                on_delete=models.deletion.DO_NOTHING,
                related_name="entries",
                to="executions.quota",
            ),
        ),
    ]
