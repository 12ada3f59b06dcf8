"""What a user calls: the command line (cli), and its verbs in Python (verbs)."""
