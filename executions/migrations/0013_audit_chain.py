"""Chain the audit's events by hash, and have the database refuse to change or delete one."""

import hashlib
import json
from datetime import UTC

from django.db import migrations, models

HASHED = (
    "seq", "previous", "at", "team_id", "actor_id", "key_id", "action", "subject", "before", "after", "reason", "ip",
)  # fmt: skip

GUARD = {
    "sqlite": [
        "CREATE TRIGGER audit_event_is_not_changed BEFORE UPDATE ON executions_auditevent "
        "BEGIN SELECT RAISE(ABORT, 'audit events are never changed'); END",
        "CREATE TRIGGER audit_event_is_not_deleted BEFORE DELETE ON executions_auditevent "
        "BEGIN SELECT RAISE(ABORT, 'audit events are never deleted'); END",
    ],
    "postgresql": [
        "CREATE FUNCTION audit_event_stays() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'audit events are never changed or deleted'; END $$",
        "CREATE TRIGGER audit_event_is_not_changed BEFORE UPDATE ON executions_auditevent "
        "FOR EACH ROW EXECUTE FUNCTION audit_event_stays()",
        "CREATE TRIGGER audit_event_is_not_deleted BEFORE DELETE ON executions_auditevent "
        "FOR EACH ROW EXECUTE FUNCTION audit_event_stays()",
        "CREATE TRIGGER audit_is_not_emptied BEFORE TRUNCATE ON executions_auditevent "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_event_stays()",
    ],
}
UNGUARD = {
    "sqlite": ["DROP TRIGGER audit_event_is_not_changed", "DROP TRIGGER audit_event_is_not_deleted"],
    "postgresql": ["DROP FUNCTION audit_event_stays() CASCADE"],
}


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


def run(statements):
    def apply(apps, schema_editor):
        for statement in statements[schema_editor.connection.vendor]:
            schema_editor.execute(statement)

    return apply


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
        migrations.RunPython(run(GUARD), run(UNGUARD)),
    ]
