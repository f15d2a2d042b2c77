"""Alembic runs this file; the connection and its transaction are the store's."""

from alembic import context

from nagaya.control.store import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
