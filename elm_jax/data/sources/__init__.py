"""Where rows come from: files, TFDS, cached P3."""
