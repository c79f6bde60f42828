"""Measures of what a model makes."""
