"""What has the database refuse to change or delete an audit event; no migration by itself."""

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


def guard(apps, schema_editor):
    for statement in GUARD[schema_editor.connection.vendor]:
        schema_editor.execute(statement)


def unguard(apps, schema_editor):
    for statement in UNGUARD[schema_editor.connection.vendor]:
        schema_editor.execute(statement)
