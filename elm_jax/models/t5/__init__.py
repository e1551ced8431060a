"""T5: config, network, modules, and its names in other programs' files."""
