"""llama.cpp's files: one file holds metadata, tokenizer and tensors, most of them quantised."""
