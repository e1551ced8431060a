"""What is to be merged how: recipes by flags, and in mergekit's schema."""
