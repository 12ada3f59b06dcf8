"""Bits per byte with intervals, cost, probes, validation, comparison, and the protocol of experiments."""
