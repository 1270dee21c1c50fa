"""The systems that the demo compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vr_jax.errors import UserError


@dataclass(frozen=True)
class DemoSystem:
    """One system.

    Attributes:
        name: The name of its folder, and the beginning of the names of its variants in configs/reading.py.
        title: The name on the page.
        ratio: The number of patches for each vision token.
        remembers: Whether Vision Remember re-reads the encoder's features.
    """

    name: str
    title: str
    ratio: int
    remembers: bool = False


# In the order in which they are trained. Pairs with and without Vision Remember stand together.
SYSTEMS = (
    DemoSystem("vision_remember_9", "pooling + Vision Remember", 9, remembers=True),
    DemoSystem("pooling_9", "pooling", 9),
    DemoSystem("vision_remember_16", "pooling + Vision Remember", 16, remembers=True),
    DemoSystem("pooling_16", "pooling", 16),
    DemoSystem("token_packer_9", "TokenPacker", 9),
)


def find_systems(names: Sequence[str]) -> tuple[DemoSystem, ...]:
    """The systems with these names, in the order of `SYSTEMS`.

    Raises:
        UserError: There is no system with such a name, one is named twice, or none of them remembers.
    """
    known = [system.name for system in SYSTEMS]
    for name in names:
        if name not in known:
            raise UserError(f"the demo has no system {name!r}; choose among {', '.join(known)}")
        if names.count(name) > 1:
            raise UserError(f"--systems={','.join(names)}: {name} is named twice; name it once")
    found = tuple(system for system in SYSTEMS if system.name in names)
    if not any(system.remembers for system in found):
        raise UserError(f"--systems={','.join(names)}: none has Vision Remember, with which the page compares; add one")
    return found
