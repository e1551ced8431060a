"""Parts of a network that several layers make up."""
