"""What users run and what is submitted to a cluster: `agcl ...`, or `python -m jobs ...`."""
