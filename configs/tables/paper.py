"""Any row of the paper's Tables 1-5: --config=configs/tables/paper.py:TABLE/ROW/SIZE/PHASE.

E.g. `table1/perceiver_vr/1.5b/phase2`; SIZE (0.5b, 1.5b, 7b) and PHASE (phase1, phase2) may be left out. All rows:
`vr-jax experiments`; they are declared there."""

from ml_collections import ConfigDict

from vr_jax.settings import recipe


def get_config(variant: str = "table2/ratio9_vr") -> ConfigDict:
    return recipe.table_row(variant)
