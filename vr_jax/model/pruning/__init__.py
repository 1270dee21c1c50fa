"""Training-free pruners, which drop vision tokens of an already trained model at inference."""
