"""Readers of public 3D datasets: each yields scenes of one schema from files as they were released."""
