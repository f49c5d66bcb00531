"""Names of latents with a measured quality: ``mmsae name``."""
