"""Kernels that insert a batch's products into a running top-K."""
