"""What every trainer shares: launch, checkpoints, optimiser and schedule, progress."""
