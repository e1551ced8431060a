"""Merging methods: the table of what there is, and the pieces that they are made of."""
