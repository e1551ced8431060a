"""Sentence encoders of BERT's kind."""
