"""Scripts of the lint step and of the set-up; no part of the package."""
