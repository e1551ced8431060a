"""The runtime under everything: files, trees of arrays, meshes, processes, leases."""
