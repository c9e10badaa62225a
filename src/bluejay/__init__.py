"""Bluejay: GPT-J and GPT-Neo on hardware you own."""

__version__ = "0.1.0"
