"""The model: modules and pure functions of arrays."""
