"""Alembic's environment: the connection comes from dicomai.store.database."""

from alembic import context

from dicomai.store.tables import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
