"""States behind the frozen lower layers of a network, computed once a row and kept on disk."""
