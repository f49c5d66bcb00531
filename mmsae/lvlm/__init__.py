"""What an SAE on a vision-language model is used for."""
