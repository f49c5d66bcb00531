"""What an SAE is used for: each task a module of its own."""
