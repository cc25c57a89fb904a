"""Scenes to verifiable spatial question-answer rows."""
