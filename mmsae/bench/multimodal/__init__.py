"""``mmsae bench multimodal``: every SAE over pairs, on the generated world and on photographs."""
