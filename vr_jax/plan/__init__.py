"""Plans a run on devices that nobody holds: its program is compiled ahead of time and its costs are counted.

`plan_training` and `plan_inference` compile the programs of `vr_jax.training` and `vr_jax.inference`, `search` compares
meshes, and `report` writes plans as text. docs/plan.md explains the numbers.
"""

from vr_jax.plan import report
from vr_jax.plan.chips import CHIPS, Chip
from vr_jax.plan.hlo_costs import Costs, program_costs
from vr_jax.plan.inference import Request, plan_inference
from vr_jax.plan.results import Memory, Plan, Roofline, Schedule, Work
from vr_jax.plan.search import SearchResult, search
from vr_jax.plan.topology import EXAMPLES, Topology, open_topology, prepare_process
from vr_jax.plan.training import plan_training

__all__ = [
    "CHIPS",
    "EXAMPLES",
    "Chip",
    "Costs",
    "Memory",
    "Plan",
    "Request",
    "Roofline",
    "Schedule",
    "SearchResult",
    "Topology",
    "Work",
    "open_topology",
    "plan_inference",
    "plan_training",
    "prepare_process",
    "program_costs",
    "report",
    "search",
]
