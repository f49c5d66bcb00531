"""Image-text shards: sources, decoding, uids, faults, loaders and a writer."""

from mmsae.files import disk_errors
from mmsae.moved import earlier
from mmsae.shards.batches import Reader, place, taken, tried
from mmsae.shards.decode import BrokenImage, decode_image, decoder, to_rgb
from mmsae.shards.describe import count_samples, describe
from mmsae.shards.faults import NOTES, FaultLog
from mmsae.shards.groups import groups
from mmsae.shards.pipeline import FAULT_LIMIT, ExactLoader, TrainLoader, make_pipeline, unit_batches
from mmsae.shards.read import Sample, read_shard, read_shards, with_image
from mmsae.shards.shard import Shard, as_shard, identity, shard_name, shard_size
from mmsae.shards.sources import Source, Sources, as_sources, expand
from mmsae.shards.streams import UnitBatch
from mmsae.shards.uid_list import UidList
from mmsae.shards.uid_set import UidSet
from mmsae.shards.uids import draw, group_uid, make_uid
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
    "UidList",
    "UidSet",
    "UnitBatch",
    "as_shard",
    "as_sources",
    "count_samples",
    "decode_image",
    "decoder",
    "describe",
    "disk_errors",
    "draw",
    "expand",
    "group_uid",
    "groups",
    "identity",
    "make_pipeline",
    "make_uid",
    "place",
    "read_shard",
    "read_shards",
    "shard_name",
    "shard_size",
    "taken",
    "to_rgb",
    "tried",
    "unit_batches",
    "with_image",
]

__getattr__ = earlier(__name__)
