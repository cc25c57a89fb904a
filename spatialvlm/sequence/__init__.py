"""Token layout, positions, pixels: pure functions that data and models share."""
