"""What is wrong with a request, in one line."""


class PlanError(ValueError):
    """A topology, recipe or setting that cannot be planned; one line for the user."""
