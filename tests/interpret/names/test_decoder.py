"""Atoms to words: the modality direction is what would otherwise decide."""

import numpy as np

from mmsae.interpret.names.decoder import decoder_scores, without
from mmsae.interpret.names.phrases import best_phrases


def test_without_leaves_nothing_along_the_direction():
    rng = np.random.default_rng(0)
    x, d = rng.normal(size=(5, 4)), rng.normal(size=4)
    assert np.allclose(without(x, d) @ d, 0) and np.allclose(without(x, np.zeros(4)), x)


def test_words_near_the_images_win_until_the_direction_is_projected_out():
    gap = np.zeros(8)
    gap[7] = 1
    words = np.eye(8)[:5] - 0.2 * gap
    words[4] = 0.3 * np.eye(8)[4] + 0.9 * gap  # a word that happens to lie towards the images
    atoms = 0.5 * np.eye(8)[:4] + gap  # image latents of the first four words
    phrases = ["a", "b", "c", "d", "image-like"]
    args = atoms, np.arange(4), phrases, words
    plain = best_phrases(decoder_scores(*args, np.zeros(8)), 1, "none").phrase[:, 0]
    assert (plain == 4).all()
    right = best_phrases(decoder_scores(*args, gap), 1, "none").phrase[:, 0]
    assert right.tolist() == [0, 1, 2, 3]
