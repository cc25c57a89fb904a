"""Lifting of plain video to 3D scenes: recognise, segment, place, merge, fit boxes."""
