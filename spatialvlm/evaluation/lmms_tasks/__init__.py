"""Task files for lmms-eval (``--include_path``)."""
