"""presence of findings, replaced results

Revision: 0002, after 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

V_FINDING = """
SELECT finding.study_instance_uid, finding.series_instance_uid, finding.sop_instance_uid,
       finding.frame_number, finding.label, finding.code_value AS code, finding.code_scheme,
       finding.probability, finding.threshold, finding.positive,{presence}
       analysis.model_name, analysis.model_version, finding.analyzed_at
FROM study
JOIN analysis ON analysis.study_instance_uid = study.study_instance_uid
             AND analysis.revision = study.analyzed_revision
JOIN finding ON finding.analysis_id = analysis.id
"""

# A report was replaced by the next one of its study.
REPLACED = """
UPDATE result SET replaced_by = (
    SELECT later.sop_instance_uid
    FROM result AS later
    JOIN analysis AS after ON after.id = later.analysis_id
    JOIN analysis AS before ON before.id = result.analysis_id
    WHERE later.study_instance_uid = result.study_instance_uid AND later.kind = 'sr'
      AND after.revision > before.revision
    ORDER BY after.revision LIMIT 1)
WHERE kind = 'sr'
"""

TRIED = """
UPDATE delivery SET tried = true
WHERE attempts > 0 OR state IN ('sending', 'delivered', 'failed')
"""


def upgrade() -> None:
    op.add_column("finding", sa.Column("presence", sa.String(length=12), nullable=True))
    op.execute("UPDATE finding SET presence = CASE WHEN positive THEN 'present' ELSE 'absent' END")
    op.add_column("result", sa.Column("replaced_by", sa.String(length=64), nullable=True))
    op.execute(REPLACED)
    op.add_column(
        "delivery", sa.Column("tried", sa.Boolean(), nullable=False, server_default=sa.false())
    )
    op.execute(TRIED)
    op.execute("DROP VIEW v_finding")
    with op.batch_alter_table("finding") as table:
        table.alter_column("presence", existing_type=sa.String(length=12), nullable=False)
    op.execute("CREATE VIEW v_finding AS " + V_FINDING.format(presence=" finding.presence,"))


def downgrade() -> None:
    op.execute("DROP VIEW v_finding")
    op.drop_column("finding", "presence")
    op.drop_column("result", "replaced_by")
    op.drop_column("delivery", "tried")
    op.execute("CREATE VIEW v_finding AS " + V_FINDING.format(presence=""))
