"""`elm tasks`: lists, shows, counts, checks and caches tasks."""
