"""How well explanations of latents hold: ``mmsae score``."""
