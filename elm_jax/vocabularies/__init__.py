"""Vocabularies: SentencePiece, tokenizer.json and bytes, read, used and converted."""
