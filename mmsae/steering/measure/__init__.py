"""What an edit changed."""
