"""Small models for tests and smoke runs: complete checkpoints, a geometry encoder file, a tokenizer."""

from spatialvlm.testing.checkpoints import make_checkpoint
from spatialvlm.testing.vggt import make_vggt

__all__ = ["make_checkpoint", "make_vggt"]
