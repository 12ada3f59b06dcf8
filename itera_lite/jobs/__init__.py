"""Notebooks run one after another, each with its record."""
