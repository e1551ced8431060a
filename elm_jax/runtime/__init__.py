"""What everything stands on: files, trees of arrays, meshes, processes, clocks of leases."""
