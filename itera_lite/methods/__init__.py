"""Nine ways to make a model smaller, and the function for all of them: methods.compress."""
