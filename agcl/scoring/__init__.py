"""Scoring a model's answers: teacher-forced, generated, and the scorers."""
