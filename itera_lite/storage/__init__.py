"""How tensors are stored in fewer bits: formats, packed weights, precision maps, entropy coding, activations."""
