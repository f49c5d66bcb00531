import pytest

from mmsae.interpret.attributes.file import read_attributes, write_attributes
from mmsae.metrics.statistics import Interval
from mmsae.steering.methods.attributes import Attribute
from mmsae.types import InputError

SAE = "s" * 32


def test_attributes_are_written_and_read(tmp_path):
    found = {3: [Attribute("red", 0.1, 4.0, 5.0, Interval(0.9, float("nan"), float("nan"), 4, 1))], 8: []}
    path = write_attributes(tmp_path / "attributes.json", found, SAE, rates={"features": {"asked": 2}})
    read = read_attributes(path, SAE)
    latents = read["latents"]
    assert latents["8"] == [] and latents["3"][0]["word"] == "red" and read["rates"]["features"] == {"asked": 2}
    assert latents["3"][0]["choice"] == {"mean": 0.9, "low": None, "high": None, "n": 4, "prompts": 1}
    assert read_attributes(tmp_path, SAE) == read  # the folder will do
    with pytest.raises(InputError, match="attributes of SAE ssssssssssss"):
        read_attributes(path, "t" * 32)
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(InputError, match="holds no attributes"):
        read_attributes(tmp_path / "b.json", SAE)
