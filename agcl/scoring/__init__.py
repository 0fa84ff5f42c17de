"""Scoring a model's answers: teacher-forced or generated, and the scorers."""
