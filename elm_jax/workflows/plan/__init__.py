"""The flag `--plan`: what a run needs, before a chip is rented."""
