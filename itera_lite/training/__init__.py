"""The trainer, its checkpoints, trials, teachers and the smoke model."""
