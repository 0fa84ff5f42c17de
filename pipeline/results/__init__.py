"""What a user looks at after a run."""
