"""Attention under a pattern: the float32 truth, the fast paths, and the one door to them."""
