"""Procedural rooms: layout, furniture, camera walks, appearance, rendering."""
