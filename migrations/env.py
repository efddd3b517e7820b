"""Alembic's entry: runs on the connection that `controlplane.store.schema` hands over."""

from alembic import context

from controlplane.store.tables import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata, compare_server_default=True)
with context.begin_transaction():
    context.run_migrations()
