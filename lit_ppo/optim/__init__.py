"""Learning-rate schedules, and optimizer settings across a resume."""
