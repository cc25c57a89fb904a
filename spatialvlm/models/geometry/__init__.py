"""Frozen geometry encoders, and how their features become spatial tokens."""
