"""The training loop and everything it needs: engines, checkpoints, guard, trackers, estimates.

Start reading at :func:`spatialvlm.training.loop.train`.
"""
