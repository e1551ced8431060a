"""The command line: one file for each verb, the flags, and the gin configuration."""
