"""Kimi Delta Attention as a mixer."""
