"""The command line: a file a verb, flags, and gin at the edge."""
