"""Evaluation: rank classification, generation, metrics, results."""
