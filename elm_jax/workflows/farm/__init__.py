"""The verbs `elm farm ...`: a table of experts, trained by many workers."""
