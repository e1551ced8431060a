"""BERT-type sentence encoders."""
