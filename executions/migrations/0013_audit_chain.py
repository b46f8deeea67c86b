"""Chain the audit's events by hash, and have the database refuse to change or delete one."""

import hashlib
import json
from datetime import UTC

from django.db import migrations, models

from executions.migrations._audit_guard import guard, unguard

HASHED = (
    "seq", "previous", "at", "team_id", "actor_id", "key_id", "action", "subject", "before", "after", "reason", "ip",
)  # fmt: skip

def chain(apps, schema_editor):
    """Number and hash what there is, in the order in which it was written."""
    event_model, head_model = (apps.get_model("executions", name) for name in ("AuditEvent", "AuditHead"))
    seq, previous = 0, ""
    for event in event_model.objects.order_by("id").iterator(chunk_size=1000):
        seq += 1
        event.seq, event.previous = seq, previous
        whole = {name: getattr(event, name) for name in HASHED}
        whole["at"] = event.at.astimezone(UTC).isoformat(timespec="microseconds")
        text = json.dumps(whole, sort_keys=True, separators=(",", ":"))
        event.digest = previous = hashlib.sha256(text.encode()).hexdigest()
        event.save(update_fields=["seq", "previous", "digest"])
    if seq:
        head_model.objects.create(id=1, seq=seq, digest=previous)


class Migration(migrations.Migration):

    dependencies = [
        ('executions', '0012_cost_totals'),
    ]

    operations = [
        migrations.CreateModel(
            name='AuditHead',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('seq', models.BigIntegerField()),
                ('digest', models.CharField(max_length=64)),
            ],
        ),
        migrations.AddField('auditevent', 'seq', models.BigIntegerField('number', null=True, editable=False)),
        migrations.AddField(
            'auditevent', 'previous',
            models.CharField(blank=True, default='', editable=False, help_text='The hash of the event before it.', max_length=64),
            preserve_default=False,
        ),
        migrations.AddField(
            'auditevent', 'digest',
            models.CharField('hash', default='', editable=False, help_text='Of its content and the hash before it.', max_length=64),
            preserve_default=False,
        ),
        migrations.RunPython(chain, migrations.RunPython.noop),
        migrations.AlterField('auditevent', 'seq', models.BigIntegerField('number', editable=False, unique=True)),
        migrations.RunPython(guard, unguard),
    ]
