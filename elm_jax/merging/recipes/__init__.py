"""Merge recipes: settings for each leaf, from flags or from files in mergekit's schema."""
