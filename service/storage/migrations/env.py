"""Alembic's entry: runs the migrations on the engine that `Database.migrate` hands in."""

from alembic import context

from service.storage.tables import metadata

with context.config.attributes["engine"].connect() as connection:
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()
