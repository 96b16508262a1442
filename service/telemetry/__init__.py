"""What is logged, counted and traced, and what may appear there."""
