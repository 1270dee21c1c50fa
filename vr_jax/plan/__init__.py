"""What a recipe needs on a pod that nobody holds: compiled ahead of time, with no device (docs/plan.md)."""
