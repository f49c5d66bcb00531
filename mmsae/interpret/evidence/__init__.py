"""What each latent fires on, collected once: ``mmsae evidence``."""
