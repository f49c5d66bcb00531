"""What SAEs and hosts know about the world."""
