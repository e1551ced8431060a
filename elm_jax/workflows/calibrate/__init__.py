"""Calibration of libraries: how general their experts are, from tables of scores."""
