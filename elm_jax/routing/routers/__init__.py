"""Routers, one a file: each gives scores of experts from evidence and priors."""
