"""The loop and everything around it: engines, checkpoints, metrics, reports."""
