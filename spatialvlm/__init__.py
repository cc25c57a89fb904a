"""Fine-tune vision-language models on spatial intelligence.

Importing the package sets no dtype, seed, logger, or environment variable.
"""

__version__ = "0.1.0"
