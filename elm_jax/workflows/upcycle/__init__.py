"""A dense base, or the experts of one, become a sparse base."""
