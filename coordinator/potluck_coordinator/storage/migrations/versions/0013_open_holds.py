"""Only open holds are found by their deadlines, and none by its payer: closed ones, almost all, have no index to be kept for them."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_index("ix_hold_payer_account_id", "hold")
    op.drop_index("ix_hold_state_expires_at_unix_ms", "hold")
    is_open = sa.text("state = 'open'")
    op.create_index("ix_hold_open", "hold", ["expires_at_unix_ms"], sqlite_where=is_open, postgresql_where=is_open)
