"""Decoder-only networks: the Llama type (Mistral, Qwen) and GPT-2."""
