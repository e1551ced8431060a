"""Files of tensors: safetensors, PyTorch, Orbax, zarr; read and written as streams."""
