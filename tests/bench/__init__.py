"""`python -m jobs.bench`: what attribution, protection and the pipeline cost."""
