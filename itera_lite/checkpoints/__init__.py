"""Model folders, and weights from elsewhere: read without pickles, inspected, converted."""
