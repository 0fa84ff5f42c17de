"""Orchestration: configs, artifacts, the DAG of stages on Ray, tracking in MLflow."""
