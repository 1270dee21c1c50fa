"""The demo: it trains systems that start from the same pretrained parts and compares them on one page.

`systems` names what is compared, `commands` runs the commands that a user would type, and `results` reads what they
wrote and makes the page.
"""

from vr_jax.demo.commands import HELD_OUT_PAGES, PAGES, Step, prepare_steps, run_systems, run_together, system_steps
from vr_jax.demo.results import SystemResult, read_result, write_page
from vr_jax.demo.systems import SYSTEMS, DemoSystem

__all__ = [
    "HELD_OUT_PAGES",
    "PAGES",
    "SYSTEMS",
    "DemoSystem",
    "Step",
    "SystemResult",
    "prepare_steps",
    "read_result",
    "run_systems",
    "run_together",
    "system_steps",
    "write_page",
]
