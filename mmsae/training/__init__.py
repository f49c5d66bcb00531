"""Lightning training of SAEs."""

from mmsae.lazy import lazy

__all__, __getattr__ = lazy(
    __name__,
    {
        "callbacks": "DeadLatentReport ExportSAE",
        "checkpoint": "AtomicCheckpointIO RunCheckpoint",
        "k_anneal": "KAnneal",
        "latent_parallel": "LatentParallel",
        "lit": "LitSAE",
        "members.lit": "LitSAEs",
        "resample": "ResampleDead",
        "schedule": "Schedule",
    },
)
