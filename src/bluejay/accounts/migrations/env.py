"""Run the versions over the connection that the store hands in, inside its transaction."""

from __future__ import annotations

from alembic import context

from bluejay.accounts.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite alters a table by copying it
)
context.run_migrations()
