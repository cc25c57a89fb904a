"""From rows on disk to the batches of a training step."""
