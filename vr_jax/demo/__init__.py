"""Systems that start from the same tiny pretrained parts, compared on one page.

`systems` names what is compared, `commands` runs the commands that a user would type, `results` reads what they wrote
and makes the page, and `run` does all of it.
"""

from vr_jax.demo.commands import HELD_OUT_PAGES, PAGES
from vr_jax.demo.results import SystemResult, first_that_remembers, read_result
from vr_jax.demo.run import REPORT, compare
from vr_jax.demo.systems import SYSTEMS, DemoSystem, find_systems

__all__ = [
    "HELD_OUT_PAGES",
    "PAGES",
    "REPORT",
    "SYSTEMS",
    "DemoSystem",
    "SystemResult",
    "compare",
    "find_systems",
    "first_that_remembers",
    "read_result",
]
