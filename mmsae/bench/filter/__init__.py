"""``mmsae bench filter``: SAE-V's claim about choosing data, on the generated world."""
