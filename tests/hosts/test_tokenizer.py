import open_clip

from mmsae.hosts.tokenizer import HostTokenizer, token_pieces


class Fake:
    def __init__(self, *tokens):
        self.tokens = tokens

    def convert_ids_to_tokens(self, ids):
        return [self.tokens[i] for i in ids]


def read(*tokens):
    return token_pieces(Fake(*tokens), range(len(tokens)))


def test_pieces_of_open_clips_own_tokenizer_are_the_text():
    tokenizer = HostTokenizer(open_clip.SimpleTokenizer(), 77)
    ids = tokenizer(["a photo of naïve tarantulas, 3!"])[0]
    words = ids[1 : int((ids == tokenizer.eos_id()).int().argmax())].tolist()
    assert "".join(tokenizer.pieces(words)) == " a photo of naïve tarantulas , 3 !"


def test_pieces_of_every_kind_of_tokenizer_carry_the_space_before_them():
    assert read("a</w>", "tar", "antula</w>", "na", "Ã¯ve</w>") == [" a", " tar", "antula", " na", "ïve"]
    assert read("▁a", "▁tar", "antula") == [" a", " tar", "antula"]
    assert read("A", "Ġtar", "antula", "ĠÃ©") == ["A", " tar", "antula", " é"]
    assert read("a", "tar", "##antula") == [" a", " tar", "antula"]
    assert token_pieces(Fake(), []) == []
