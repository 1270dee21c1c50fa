class ConvertError(ValueError):
    """A checkpoint that cannot be converted; the message is for the user: file, tensor, found, expected."""
