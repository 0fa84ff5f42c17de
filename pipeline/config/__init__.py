"""What a user may write, and whether it can be done."""
