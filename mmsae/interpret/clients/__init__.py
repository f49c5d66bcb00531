"""Language and vision-language models that are asked: local, a server, or scripted."""
