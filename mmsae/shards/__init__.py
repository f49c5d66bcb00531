"""Image-text shards: sources, decoding, uids, faults, loaders and a writer."""

from mmsae.files import disk_errors
from mmsae.moved import earlier
from mmsae.shards.batches import Reader, place, taken, tried
from mmsae.shards.decode import BrokenImage, decode_image, to_rgb
from mmsae.shards.describe import count_samples, describe
from mmsae.shards.faults import NOTES, FaultLog
from mmsae.shards.pipeline import FAULT_LIMIT, ExactLoader, TrainLoader, make_pipeline, unit_batches
from mmsae.shards.read import Sample, UidSet, draw, make_uid, read_shard, read_shards, with_image
from mmsae.shards.sources import Shard, Source, Sources, as_sources, expand, identity, shard_name
from mmsae.shards.streams import UnitBatch
from mmsae.shards.writer import ShardWriter

__all__ = [
    "FAULT_LIMIT",
    "NOTES",
    "BrokenImage",
    "ExactLoader",
    "FaultLog",
    "Reader",
    "Sample",
    "Shard",
    "ShardWriter",
    "Source",
    "Sources",
    "TrainLoader",
    "UidSet",
    "UnitBatch",
    "as_sources",
    "count_samples",
    "decode_image",
    "describe",
    "disk_errors",
    "draw",
    "expand",
    "identity",
    "make_pipeline",
    "make_uid",
    "place",
    "read_shard",
    "read_shards",
    "shard_name",
    "taken",
    "to_rgb",
    "tried",
    "unit_batches",
    "with_image",
]

__getattr__ = earlier(__name__)
