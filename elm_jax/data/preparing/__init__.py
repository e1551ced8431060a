"""Tasks as arrays of tokens: rendered, tokenised and kept."""
