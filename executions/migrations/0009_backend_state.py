from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('executions', '0008_metric_total'),
    ]

    operations = [
        migrations.AddField(
            model_name='agent',
            name='stays_here',
            field=models.BooleanField(default=False, help_text='Its code and data never leave this machine: backends that are elsewhere are left out.'),
        ),
        migrations.CreateModel(
            name='BackendState',
            fields=[
                ('alias', models.CharField(max_length=40, primary_key=True, serialize=False)),
                ('state', models.CharField(choices=[('closed', 'Closed'), ('open', 'Open'), ('half_open', 'Half Open')], default='closed', editable=False, max_length=9)),
                ('streak', models.PositiveIntegerField(default=0, help_text='Failures since a sandbox was last made there.')),
                ('reason', models.CharField(blank=True, help_text='What the latest failure said.', max_length=200)),
                ('silent', models.BooleanField(default=False, help_text='Opened because nothing had answered in time.')),
                ('tries', models.PositiveIntegerField(default=0, help_text='Probes that failed since it opened.')),
                ('opened_at', models.DateTimeField(blank=True, null=True)),
                ('closed_at', models.DateTimeField(blank=True, null=True)),
                ('changed_at', models.DateTimeField(blank=True, help_text='When somebody last judged or tried it.', null=True)),
                ('retry_at', models.DateTimeField(blank=True, null=True)),
                ('probe_by', models.CharField(blank=True, help_text='Whose probe is under way.', max_length=32)),
                ('probe_until', models.DateTimeField(blank=True, help_text='The end of its lease.', null=True)),
                ('drill_by', models.CharField(blank=True, help_text='Who plays an outage here.', max_length=100)),
                ('drill_until', models.DateTimeField(blank=True, null=True)),
                ('creations', models.JSONField(blank=True, default=list, help_text='The latest ones, in seconds of the epoch.')),
            ],
            options={
                'constraints': [models.CheckConstraint(condition=models.Q(('state__in', ['closed', 'open', 'half_open'])), name='backend_state_known')],
            },
        ),
    ]
