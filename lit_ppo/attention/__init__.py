"""Attention of rows packed end to end, by kernels for rows of any length."""
