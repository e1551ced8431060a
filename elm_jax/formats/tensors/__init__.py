"""Reads and writes files of tensors piece by piece: safetensors, PyTorch, Orbax, zarr."""
