"""The verbs `elm tasks ...`: list, show, count, check and cache tasks."""
