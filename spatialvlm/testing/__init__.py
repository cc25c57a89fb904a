"""Tiny models and a tokenizer for tests and smoke runs."""
