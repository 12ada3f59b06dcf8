"""The mixers: S4, Mamba and Mamba-2, each as reference, scan and step."""
