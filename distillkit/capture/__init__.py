"""Asking a teacher once and keeping what it said."""
