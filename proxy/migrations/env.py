"""What alembic runs: the migrations, inside the transaction that `proxy.database` has already begun."""

from __future__ import annotations

from alembic import context

from proxy.tables import metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=True
)
with context.begin_transaction():
    context.run_migrations()
