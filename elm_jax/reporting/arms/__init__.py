"""The reports of studies that compare networks (arms): tables, paired differences, verdicts."""
