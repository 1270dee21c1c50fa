"""What goes wrong with a probe."""


class ProbeError(ValueError):
    """A probe that cannot be run as asked, or data or results that cannot be read; one line for the user."""
