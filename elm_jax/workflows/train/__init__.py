"""`elm train` and `elm pretrain`: experts, stacks of them, bases."""
