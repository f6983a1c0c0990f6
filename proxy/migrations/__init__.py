"""Migrations of the database, run by `proxy.database.open_database`.

To add one: copy the newest file in `versions/`, give it the next number, say what it does in `upgrade` (frozen:
it must not import `proxy.tables`), and append its number to `REVISIONS`.
"""

from __future__ import annotations

REVISIONS = ("0001", "0002", "0003")
"""All schemas there have been, oldest first. Known here so that a start without a migration needs no alembic."""
