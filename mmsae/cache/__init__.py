"""Activations on disk: write them once with a frozen host, read them many times, shuffled and exactly resumable."""

from mmsae.cache.buffer import MixingBuffer
from mmsae.cache.extract import extract
from mmsae.cache.loader import StoreLoader
from mmsae.cache.memory import write_store
from mmsae.cache.spec import StoreSpec
from mmsae.cache.store import ActivationStore, describe_store
from mmsae.cache.stream import CaptureLoader, StreamingLoader
from mmsae.cache.synthetic import SyntheticLoader, SyntheticPairs
from mmsae.cache.writer import StoreWriter

__all__ = [
    "ActivationStore",
    "CaptureLoader",
    "MixingBuffer",
    "StoreLoader",
    "StoreSpec",
    "StoreWriter",
    "StreamingLoader",
    "SyntheticLoader",
    "SyntheticPairs",
    "describe_store",
    "extract",
    "write_store",
]
