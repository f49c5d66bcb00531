"""Names of latents where what they mean is known: ``mmsae bench names``."""
