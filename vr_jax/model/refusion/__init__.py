"""Re-fusion blocks, which update the vision tokens between two decoder stages."""
