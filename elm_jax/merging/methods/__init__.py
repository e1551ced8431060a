"""Merging methods: the table of methods, and the steps that they are composed of."""
