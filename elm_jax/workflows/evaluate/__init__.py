"""`elm evaluate`: a base, experts, or an expert a row, scored on tasks."""
