"""Renderers: exact ray casting of boxes, the numpy rasteriser, and optional backends."""
