"""What a model's output says: thinking, text, and calls of tools, each family in a format of its own."""
