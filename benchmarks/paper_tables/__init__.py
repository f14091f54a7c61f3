"""The tables of `papers.py`, a module for each kind of data."""
