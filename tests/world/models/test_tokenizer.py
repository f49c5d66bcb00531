import pytest
from open_clip.tokenizer import HFTokenizer

from mmsae.types import InputError
from mmsae.world.models.tokenizer import EOS, PAD, UNK, token_ids, vocabulary, word_tokenizer, words_of


def test_vocabulary_is_ordered_by_frequency_then_alphabet_and_capped():
    assert vocabulary(["b a b", "C a! b"]) == ["b", "a", "!", "c"]
    assert vocabulary(["b a b", "c a b"], max_words=2) == ["b", "a"]
    with pytest.raises(InputError, match="no word"):
        vocabulary(["", "  "])


@pytest.mark.parametrize("words", [["one"], ["a", "red", "cat"]])
def test_special_ids(words):
    tokenizer = word_tokenizer(words)
    vocab = tokenizer.get_vocab()
    assert vocab[PAD] == 0 == tokenizer.pad_token_id and vocab[UNK] == 1 == tokenizer.unk_token_id
    assert vocab[EOS] == max(vocab.values()) == len(words) + 2 == tokenizer.eos_token_id != 2


def test_long_texts_keep_the_end_mark_and_unknown_words_are_marked():
    tokenizer = word_tokenizer(["a", "red", "cat"])
    ids = token_ids(tokenizer, ["a red cat", "A RED dog, a red cat", ""], 5)
    assert ids.tolist() == [[2, 3, 4, 5, 0], [2, 3, 1, 1, 5], [5, 0, 0, 0, 0]]


def test_open_clip_reads_the_same_ids_from_the_folder(tmp_path):
    texts = ["Một con mèo, đỏ!", "salt &amp; pepper", "two  spaces\nand a line", "it’s", "naïve café", "a <tag>"]
    tokenizer = word_tokenizer(vocabulary(texts))
    tokenizer.save_pretrained(tmp_path)
    theirs = HFTokenizer(str(tmp_path), context_length=9)
    ours = token_ids(tokenizer, texts, 9)
    assert theirs(texts).equal(ours)
    assert (ours == 1).sum() == 0, "every word of the captions is in the vocabulary"


def test_words_are_what_the_tokenizer_splits_into():
    for text in ("it's a #1 dog-house...", "Đỏ và xanh", "a_b c"):
        tokenizer = word_tokenizer(vocabulary([text]))
        assert len(words_of(text)) + 1 == int((token_ids(tokenizer, [text], 40) != 0).sum())
