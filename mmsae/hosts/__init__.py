"""Frozen hosts: load one by name, read its activations at a site, replace them there."""

from mmsae.lazy import lazy

# open_clip, timm and transformers take seconds to import, so only who names them pays
__all__, __getattr__ = lazy(
    __name__,
    {
        "base": "Host Rows pick_device",
        "diffusion.host": "DiffusionHost",
        "encoders.encoder": "Encoder as_encoder",
        "encoders.module": "ModuleHost",
        "encoders.open_clip": "OpenCLIPHost",
        "encoders.timm": "TimmHost",
        "encoders.transformers": "TransformersHost",
        "load": "embed_width host_modalities load_host site_width",
        "lvlm.host": "LVLMHost",
        "names": "HostName named_host parse with_options",
        "protocols": "Answers Generates",
    },
)
