"""``mmsae bench``: published claims, tested on a generated world."""
