"""Graphs and packed products that run a compressed model fast on a processor, and the package that carries them."""
