"""The verbs `elm train` and `elm pretrain`: experts, stacks of experts, bases."""
