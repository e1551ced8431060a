"""Vocabularies (SentencePiece, tokenizer.json, bytes): reads, uses and converts them."""
