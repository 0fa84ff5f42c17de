"""`PYTHONPATH=tests python -m bench`: what attribution, protection and the pipeline cost."""
