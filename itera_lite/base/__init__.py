"""Errors, records, figures, the machine, text, tokenizers and batches: what every other room stands on."""
