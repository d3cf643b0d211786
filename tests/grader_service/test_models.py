"""The tables that the models describe are the tables that the migrations make."""

from collections.abc import Callable

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, Engine, insert, text
from sqlalchemy.exc import IntegrityError

from grader_service.database import open_engine, reading, writing
from grader_service.models import JOBS, Base

_POSTGRESQL = (
    "SELECT table_name, column_name, data_type, is_nullable, column_default FROM information_schema.columns "
    "WHERE table_schema = 'public' AND table_name <> 'alembic_version'",
    "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint "
    "WHERE connamespace = 'public'::regnamespace AND conrelid <> 'alembic_version'::regclass",
    "SELECT tablename, indexname, indexdef FROM pg_indexes "
    "WHERE schemaname = 'public' AND tablename <> 'alembic_version'",
)
_SQLITE = "SELECT type, name, sql FROM sqlite_master WHERE name NOT LIKE '%alembic%'"


def _schema(connection: Connection) -> list[object]:
    """All that the database knows of its tables, whatever the order in which it was told."""
    if connection.dialect.name == "postgresql":
        return sorted(tuple(map(str, row)) for query in _POSTGRESQL for row in connection.execute(text(query)))
    rows = connection.execute(text(_SQLITE)).all()
    return sorted(
        (kind, name, sorted(line.strip(" ,\t") for line in (sql or "").split("\n"))) for kind, name, sql in rows
    )


def test_models_and_migrations_make_the_same_tables(engine: Engine, new_database: Callable[[], str]) -> None:
    modelled = open_engine(new_database())
    with writing(modelled) as connection:
        Base.metadata.create_all(connection)
        connection.execute(text("CREATE TABLE alembic_version (version_num TEXT)"))
        described = _schema(connection)
    modelled.dispose()
    with reading(engine) as connection:
        assert _schema(connection) == described
    assert len(described) > 10


def test_alembic_sees_no_difference_between_models_and_migrations(engine: Engine) -> None:
    with reading(engine) as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []


def test_alembic_would_see_a_difference(engine: Engine) -> None:
    with writing(engine) as connection:
        connection.execute(text("ALTER TABLE jobs ADD COLUMN extra TEXT"))
        connection.execute(text("DROP INDEX ix_jobs_student"))
    with reading(engine) as connection:
        found = compare_metadata(MigrationContext.configure(connection), Base.metadata)
    assert sorted(difference[0] for difference in found) == ["add_index", "remove_column"]


@pytest.mark.parametrize(
    "wrong", [{"state": "lost"}, {"kind": "urgent"}, {"id": None}, {"course": None}, {"id": "job 1"}], ids=str
)
def test_the_database_refuses_what_no_job_can_be(engine: Engine, wrong: dict[str, str | None]) -> None:
    values = {
        column.name: "x" if column.type.python_type is str else 1 for column in JOBS.columns if not column.nullable
    }
    sound = {**values, "state": "queued", "kind": "batch", "asked": {}, "sequence": 1, "id": "job 1"}
    with writing(engine) as connection:
        connection.execute(insert(JOBS).values(sound))
    with pytest.raises(IntegrityError), writing(engine) as connection:
        connection.execute(insert(JOBS).values({**sound, "sequence": 2, "id": "job 2", **wrong}))


def test_numbers_of_deleted_jobs_do_not_come_back(engine: Engine) -> None:
    values = {
        column.name: "x" if column.type.python_type is str else 1 for column in JOBS.columns if not column.nullable
    }
    job = {**values, "state": "queued", "kind": "batch", "asked": {}}
    del job["sequence"]
    numbers = []
    for name in ("a", "b"):
        with writing(engine) as connection:
            connection.execute(insert(JOBS).values({**job, "id": name}))
            numbers.append(connection.execute(text("SELECT sequence FROM jobs")).scalar_one())
            connection.execute(text("DELETE FROM jobs"))
    assert numbers[0] < numbers[1]
