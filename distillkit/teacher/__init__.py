"""What a teacher says about a batch, and the ways to ask it."""
