"""Understanding latents: evidence, names, scores, analysis by concepts, and the browser.

Everything here reads one folder of evidence (:mod:`mmsae.interpret.evidence.folder`), works without a network, and lets
a language or vision-language model only improve names.
"""

from mmsae.moved import earlier

__getattr__ = earlier(__name__)
