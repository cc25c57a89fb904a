"""Scorers, prompts, generation, reports.

bench = load_benchmark("vsi_bench", "test.jsonl")
predictions, warnings = read_predictions("predictions.jsonl")
print(score(bench, predictions, protocol="easi").line())
"""

from spatialvlm.evaluation.predictions import read_predictions
from spatialvlm.evaluation.registry import load_benchmark
from spatialvlm.evaluation.scoring import compare, score

__all__ = ["compare", "load_benchmark", "read_predictions", "score"]
