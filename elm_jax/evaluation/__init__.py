"""Evaluation: accuracy by rank, generation, results, report."""
