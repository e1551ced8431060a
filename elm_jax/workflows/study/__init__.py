"""The verb `elm study`: trains, builds, routes, merges, evaluates and reports."""
