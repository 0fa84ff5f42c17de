"""MLflow mirrors the storage."""
