"""Prepared splits and batches: arrays of tokens, packed, cut and put in order."""
