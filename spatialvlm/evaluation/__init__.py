"""Scorers, prompts, generation, reports."""
