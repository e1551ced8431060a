"""The verb `elm convert`: models and experts between this program, Hugging Face and T5X."""
