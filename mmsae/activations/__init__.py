"""Activations on disk: write them once with a frozen host, read them many times, shuffled and exactly resumable."""

from mmsae.activations.extract import extract
from mmsae.activations.loader import StoreLoader
from mmsae.activations.memory import write_store
from mmsae.activations.mixing_buffer import MixingBuffer
from mmsae.activations.spec import StoreSpec
from mmsae.activations.store import ActivationStore, describe_store
from mmsae.activations.stream import CaptureLoader, StreamingLoader
from mmsae.activations.synthetic import SyntheticLoader, SyntheticPairs
from mmsae.activations.writer import StoreWriter

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
