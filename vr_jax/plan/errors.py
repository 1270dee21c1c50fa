"""What is wrong with a request, in one line."""

from vr_jax.errors import UserError


class PlanError(UserError):
    """A topology, recipe or setting that cannot be planned; one line for the user."""
