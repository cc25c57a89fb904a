"""Images and videos: paths, headers, decoding, frame choice, and resizing to model resolution.

Everything that leaves this package is uint8 ``[S, H, W, 3]`` at the size the model expects;
normalisation and patching belong to the consumer (``spatialvlm.sequence.pixels``).
"""
