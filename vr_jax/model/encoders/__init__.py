"""Vision encoders, which map tiles to feature levels."""
