"""`agcl plan`: the memory, disk and time that a config needs."""
