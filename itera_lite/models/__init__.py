"""Configurations, mixture of experts, the language models, text generation, the table of tensor axes."""
