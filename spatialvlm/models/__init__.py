"""Backbones, geometry branch, attention, and the model that composes them."""
