"""The verb `elm evaluate`: scores a base, experts, or one expert for each row, on tasks."""
