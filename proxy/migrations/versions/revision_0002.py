"""Failed requests in the hourly sums, apart from those that were refused.

They are counted from the rows that there are. Of hours whose rows were deleted, nobody knows any more.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_FAILED = sa.text(
    """
    SELECT arrived_us / 3600000000 * 3600 AS hour, tenant, key_id,
           CASE WHEN backend = '' THEN '' ELSE served_model END AS model, backend, site, currency,
           count(*) AS failed
    FROM ledger WHERE outcome IN ('backend_failed', 'cut', 'shutdown', 'lost')
    GROUP BY 1, 2, 3, 4, 5, 6, 7
    """
)
_SET = sa.text(
    """
    UPDATE usage_hourly SET failed = :failed
    WHERE hour = :hour AND tenant = :tenant AND key_id = :key_id AND model = :model
      AND backend = :backend AND site = :site AND currency = :currency
    """
)


def upgrade() -> None:
    op.add_column("usage_hourly", sa.Column("failed", sa.BigInteger, nullable=False, server_default="0"))
    connection = op.get_bind()
    groups = [dict(row) for row in connection.execute(_FAILED).mappings()]
    if groups:
        connection.execute(_SET, groups)
