"""3D-annotated scenes: schema, cameras, boxes, visibility, importers, rooms, renderer (no torch)."""
