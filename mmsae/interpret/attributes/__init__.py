"""Which attribute does a feature of a text-to-image host set? ``mmsae attributes``."""
