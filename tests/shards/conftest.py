import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image


def picture(colour=(200, 30, 60), size=(8, 6), format="PNG", mode="RGB", **kw):
    data = io.BytesIO()
    Image.new(mode, size, colour).save(data, format, **kw)
    return data.getvalue()


def tar(path, samples, gz=None):
    """A hand-made shard: samples is a list of (key, {field: bytes | str | dict})."""
    gz = path.name.endswith("gz") if gz is None else gz
    with tarfile.open(path, "w:gz" if gz else "w") as archive:
        for key, fields in samples:
            for field, value in fields.items():
                value = json.dumps(value) if isinstance(value, dict) else value
                value = value.encode() if isinstance(value, str) else value
                info = tarfile.TarInfo(f"{key}.{field}")
                info.size = len(value)
                archive.addfile(info, io.BytesIO(value))
    return str(path)


def pairs(n, start=0, **extra):
    """n good samples whose picture and caption both tell their number."""
    return [
        (f"{i:05d}", {"png": picture((i % 256, i // 256, 0)), "txt": f"picture {i}", **extra})
        for i in range(start, start + n)
    ]


def transform(image):
    return torch.from_numpy(np.asarray(image.resize((2, 2))).copy()).permute(2, 0, 1).float()


class WordTokenizer:
    """Words to (B, 4) ids: a start mark, two words and an end mark; longer captions are cut."""

    length = 4

    def __call__(self, captions):
        ids = torch.zeros(len(captions), self.length, dtype=torch.long)
        for row, caption in zip(ids, captions, strict=True):
            words = [3 + sum(map(ord, w)) for w in caption.split()][: self.length - 2]
            row[: len(words) + 2] = torch.tensor([1, *words, 2])
        return ids

    def too_long(self, captions):
        return [len(c.split()) > self.length - 2 for c in captions]


class Maker:
    picture, tar, pairs = staticmethod(picture), staticmethod(tar), staticmethod(pairs)
    transform, tokenize = staticmethod(transform), WordTokenizer()


@pytest.fixture(scope="session")
def make():
    return Maker
