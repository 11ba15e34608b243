"""What a model is, as data: its description, and the table of its parameters."""
