"""Prepared splits and batches: arrays of tokens that are cut, packed and ordered."""
