"""Speed measured against other libraries."""
