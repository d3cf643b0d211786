"""What Alembic runs to migrate: in the transaction that `grader_service.database.upgrade` has begun, and only there."""

from alembic import context

from grader_service.models import Base

connection = context.config.attributes.get("connection")
if connection is None:
    raise RuntimeError(
        "run `grader-service db upgrade`: it knows which database, and lets one process migrate at a time"
    )
context.configure(connection=connection, target_metadata=Base.metadata, compare_type=True)
with context.begin_transaction():
    context.run_migrations()
