"""Many experts trained as one program."""
