"""Vision and dual encoders of transformers (ViT, DINOv2, DINOv3, CLIP, SigLIP, ...) and their fine-tunes as hosts.

``image.embed`` and ``text.embed`` are what ``get_image_features`` and ``get_text_features`` give. In models with one
tower ``image.embed`` is what the classifier sees, or what the projection gives, or else the model's pooler output;
where the checkpoint has no pooler, it is the last state of the class token, or the mean of the patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mmsae.hosts.base import Host, Pick
from mmsae.hosts.encoders.encoder import Encoder
from mmsae.hosts.encoders.families import encodes, kept_class, unknown_family
from mmsae.hosts.encoders.pixels import Head, Scale, agreeing
from mmsae.hosts.hooks import ModulePort, Port, first_input
from mmsae.hosts.loaded import Loaded, dtype_of, plain_config, quiet, silent
from mmsae.hosts.names import HostName, loading
from mmsae.hosts.sites import Target
from mmsae.hosts.tokenizer import HostTokenizer
from mmsae.hosts.tokens import Marks, last_word, text_marks
from mmsae.types import IMAGE, TEXT, InputError

POOLER = "pooler_output"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
# what of an image processor decides the pixels
_PIXELS = (
    "do_resize size resample do_center_crop crop_size crop_pct do_rescale rescale_factor do_normalize image_mean "
    "image_std do_pad pad_size patch_size max_num_patches do_convert_rgb rescale_offset"
).split()
_LABELS = {"id2label", "label2id", "problem_type", "architectures"}  # names, and no numbers


class ProcessorTransform:
    """An image processor of transformers as a transform, PIL image to ``(3, H, W)``.

    Args:
        processor: The image processor.
        **options: Of its call.
    """

    def __init__(self, processor: Any, **options: Any) -> None:
        self.processor, self.options = processor, options

    def __call__(self, image: Image.Image) -> Tensor:
        return self.processor(image, return_tensors="pt", **self.options)["pixel_values"][0]

    def described(self) -> dict[str, Any]:
        """What decides the pixels, as plain values."""
        found = {k: v for k, v in self.processor.to_dict().items() if k in _PIXELS}
        return {k: v for k, v in plain_config(found).items() if v is not None}

    def __repr__(self) -> str:
        return f"{type(self.processor).__name__}({self.described()})"


class PatchTransform(ProcessorTransform):
    """The image processor of SigLIP 2's variable resolution: PIL image to ``(N + 1, 3 * P * P)``.

    Rows are the image's patches, row by row, and padding; the last one begins with the image's rows and columns.
    """

    def __call__(self, image: Image.Image) -> Tensor:
        made = self.processor(image, return_tensors="pt", **self.options)
        last = torch.zeros_like(made["pixel_values"][0, :1])
        last[0, :2] = made["spatial_shapes"][0]
        return torch.cat([made["pixel_values"][0], last])


class Padded:
    """A tokenizer of transformers that pads to a fixed length, as towers of images and text were trained.

    Args:
        tokenizer: The tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, texts: list[str], context_length: int) -> Tensor:
        options = {"padding": "max_length", "truncation": True, "max_length": context_length}
        return self.tokenizer(texts, return_tensors="pt", **options)["input_ids"]


class TransformersHost(Encoder):
    """A frozen vision or dual encoder of transformers.

    Args:
        model: The model, as :func:`load_model` gives it.
        processor: Its image processor.
        tokenizer: A function that gets its tokenizer when it is first needed; of dual encoders only.
        hint: How to load it again.
        device: Device that it runs on.
        precision: ``fp32``, or autocast ``bf16`` / ``fp16``.

    Raises:
        InputError: The image processor gives images of other sizes than the model takes, or of several.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        tokenizer: Callable[[], Any] | None = None,
        hint: str = "",
        device: str | torch.device = "cpu",
        precision: str = "fp32",
    ) -> None:
        dual = hasattr(model, "get_image_features")
        self.modalities = (IMAGE, TEXT) if dual else (IMAGE,)
        self.processor, self._get_tokenizer, self._dual = processor, tokenizer, dual
        config = model.config
        self.vision = getattr(config, "vision_config", config)  #: Configuration of the image tower.
        super().__init__(model, hint, device, precision)
        self.check_size()

    def check_size(self) -> None:
        """Refuse a processor whose images the model does not take."""
        shapes = [tuple(self.transform()(Image.new("RGB", size)).shape) for size in ((64, 48), (48, 64))]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"host {self.hint}: its image processor gives images of several sizes ({shapes[0][1:]} and "
                f"{shapes[1][1:]} of two), which make no batch: its preprocessor_config.json needs a crop_size, or a "
                "size with height and width."
            )
        size, built = shapes[0][1:], getattr(self.vision, "image_size", None)
        built = (built, built) if isinstance(built, int) else built
        fixed = any(n.endswith(("position_embedding.weight", "position_embeddings")) for n in self.model.state_dict())
        if fixed and built is not None and tuple(built) != size and "dinov2" not in self.model.config.model_type:
            raise InputError(
                f"host {self.hint}: its image processor gives images of {size[0]} x {size[1]} pixels "
                f"(preprocessor_config.json), but the model takes {built[0]} x {built[1]} (image_size in config.json)."
            )

    def config(self) -> dict[str, Any]:
        own = {k: v for k, v in plain_config(self.model.config.to_dict()).items() if k not in _LABELS}
        return {"class": type(self.model).__name__, **own, "preprocess": self.transform().described()}

    def transform(self, train: bool = False) -> ProcessorTransform:
        """The image processor; processors know no augmentation, so ``train`` changes nothing."""
        return ProcessorTransform(self.processor)

    @cached_property
    def _split(self) -> tuple[Head, Scale] | None:
        """Rescaling and normalising, which processors do in one, are left to the device."""
        whole, own = self.transform(), self.processor.to_dict()
        if not (own.get("do_rescale") and own.get("do_normalize")):
            return None
        step = ProcessorTransform(self.processor, do_rescale=False, do_normalize=False)
        factor = torch.tensor(1.0 / own["rescale_factor"])
        mean, std = (torch.tensor(own[k]).view(-1, 1, 1) * factor for k in ("image_mean", "image_std"))
        return agreeing(Head((step,), whole), Scale(mean, std, torch.ones(1)), self.device)

    def probe_input(self, modality: str, n: int) -> Tensor:
        if modality == TEXT:
            return torch.full((n, self.context_length), self._text.config.eos_token_id or 0)
        return self._blank.new_zeros(n, *self._blank.shape)

    @cached_property
    def _blank(self) -> Tensor:
        """What the transform makes of a black image."""
        with torch.device("cpu"):
            return self.transform()(Image.new("RGB", (64, 48)))

    # Texts.

    @cached_property
    def tokenize(self) -> HostTokenizer | None:
        if TEXT not in self.modalities:
            return None
        try:
            tokenizer = self._get_tokenizer()
        except (OSError, ValueError, RuntimeError) as e:
            raise InputError(f"the tokenizer of host {self.hint} cannot be loaded: {str(e).splitlines()[0]}") from e
        return HostTokenizer(Padded(tokenizer), self.context_length)

    def too_long(self, texts: list[str]) -> list[bool]:
        """Which texts the tokenizer truncates."""
        return self.tokenize.too_long(texts)

    @property
    def context_length(self) -> int | None:
        return self._text.config.max_position_embeddings if self._dual else None

    @property
    def logit_scale(self) -> float | None:
        return self.model.logit_scale.exp().item() if self._dual else None

    @property
    def logit_bias(self) -> float | None:
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else bias.item()

    @property
    def _text(self) -> nn.Module:
        return self.model.text_model

    # Embeddings.

    def inputs(self, x: Tensor) -> dict[str, Tensor]:
        """The model's arguments of images ``x`` as :meth:`transform` makes them."""
        return {"pixel_values": x.to(self.model.dtype)}

    def encode(self, modality: str, x: Tensor) -> Tensor:
        if modality == TEXT:
            return _pooled(self.model.get_text_features(input_ids=x))
        if self._dual:
            return _pooled(self.model.get_image_features(**self.inputs(x)))
        if self._head is not None:
            return self._seen_by_head(x)[0]
        out = self.model(**self.inputs(x))
        if (pooled := out.get("image_embeds", out.get(POOLER))) is not None:
            return pooled
        return out.last_hidden_state[:, 0] if self.has_cls(IMAGE) else out.last_hidden_state.mean(1)

    @cached_property
    def _head(self) -> nn.Module | None:
        """The classifier, of a model that has one."""
        return getattr(self.model, "classifier", None)

    def _seen_by_head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the classifier sees, with all edits, and the logits."""
        seen: list[Tensor] = []

        def note(_: nn.Module, args: tuple, kwargs: dict) -> None:
            seen[:] = [first_input(args, kwargs)[1]]

        with self._head.register_forward_pre_hook(note, with_kwargs=True):
            logits = self.model(**self.inputs(x)).logits
        return seen[0], logits

    @cached_property
    @torch.no_grad()
    def classifier(self) -> tuple[Tensor, Tensor] | None:
        """Whether the classifier is linear in the embeddings is found by trying it."""
        layer = self._head
        if not isinstance(layer, nn.Linear):
            return None
        features, logits = self._seen_by_head(self.probe_input(IMAGE, 2).to(self.device))
        if not torch.allclose(layer(features), logits, rtol=1e-3, atol=1e-4):
            return None
        bias = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias
        return layer.weight.float().cpu(), bias.float().cpu()

    def endpoint(self, name: str) -> Port:
        modality, _, which = name.partition(".")
        io = "out" if which == "embed" else "in"
        projection = "text_projection" if modality == TEXT else "visual_projection"
        if isinstance(layer := getattr(self.model, projection, None), nn.Linear):
            return ModulePort(layer, io)
        if modality == TEXT:  # SigLIP's projects inside of the tower
            return ModulePort(self._text.head, io)
        if self._head is not None:
            return ModulePort(self._head, "in")
        if self._dual:
            return ModulePort(self.model.vision_model, "out", POOLER)
        return ModulePort(self.model, "out", POOLER) if self._pools else super().endpoint(name)

    @cached_property
    @torch.no_grad()
    def _pools(self) -> bool:
        """Whether the model gives a pooler's output."""
        with self.unseen():
            return self.model(**self.inputs(self.probe_input(IMAGE, 1).to(self.device))).get(POOLER) is not None

    # Tokens.

    def tower(self, module: str) -> str:
        return TEXT if self._dual and module.split(".")[0] in ("text_model", "text_projection") else IMAGE

    def ids_entry(self) -> nn.Module | None:
        return self._text if self._dual else None

    @cached_property
    def _prefix(self) -> tuple[int, int | None]:
        size = getattr(self.vision, "patch_size", None)
        names = [n.rpartition(".")[2] for n, _ in self.model.named_parameters()]
        n = sum(k in names for k in ("cls_token", "class_embedding", "distillation_token"))
        if not isinstance(size, (int, tuple, list)) or hasattr(self.vision, "depths"):  # stages halve the grid
            return n, None
        h, w = (size, size) if isinstance(size, int) else size
        rows, cols = self._blank.shape[1] // h, self._blank.shape[2] // w
        return n + (getattr(self.vision, "num_register_tokens", 0) if n else 0), rows * cols

    def prefix(self, modality: str) -> tuple[int, int | None]:
        return self._prefix

    def marks(self, modality: str, tokens: Tensor, ids: Tensor | None, is_map: bool) -> Marks:
        """As :meth:`Encoder.marks`; ``eos`` is the token that the text tower pools."""
        found = super().marks(modality, tokens, ids, is_map)
        if modality == IMAGE:
            return found
        ids, config, inner = ids.to(tokens.device), self._text.config, self.tokenize.tokenizer.tokenizer
        special = self.tokenize.special_ids()
        if hasattr(self._text, "head"):  # SigLIP pools the last place
            end = last_word(ids, self.tokenize.pad_id(), self.tokenize.eos_id())
            found = text_marks(ids, end, torch.full_like(end, ids.shape[1] - 1), special)
        else:
            old = config.eos_token_id == 2 and self.model.config.model_type == "clip"  # of before the id was mended
            end = (ids if old else (ids == config.eos_token_id).int()).argmax(1)
            found = text_marks(ids, end, end, special)
        if inner.padding_side == "left":
            begun = (ids != self.tokenize.pad_id()).cumsum(1) > 0
            found = found._replace(content=found.content & begun, special=found.special | ~begun)
        return found


class Siglip2Host(TransformersHost):
    """SigLIP 2 of variable resolution (NaFlex): patches of any grid, with padding, as :class:`PatchTransform` has them.

    Checkpoints of SigLIP 2 with one resolution are of the family ``siglip``.
    """

    def check_size(self) -> None:
        """Any image is brought to the number of patches that the processor names."""

    def transform(self, train: bool = False) -> PatchTransform:
        """The image processor; processors know no augmentation, so ``train`` changes nothing."""
        return PatchTransform(self.processor)

    @cached_property
    def _split(self) -> None:
        return None

    def image_area(self) -> int:
        return self.processor.max_num_patches * self.processor.patch_size**2

    def inputs(self, x: Tensor) -> dict[str, Tensor]:
        shapes = x[:, -1, :2].round().long()
        real = torch.arange(x.shape[1] - 1, device=x.device) < shapes.prod(1)[:, None]
        patches = x[:, :-1].to(self.model.dtype)
        mask = None if x.is_meta else real.int()
        return {"pixel_values": patches, "spatial_shapes": shapes, "pixel_attention_mask": mask}

    def probe_input(self, modality: str, n: int) -> Tensor:
        if modality == TEXT:
            return super().probe_input(modality, n)
        return self._blank.expand(n, *self._blank.shape).clone()

    @cached_property
    def _prefix(self) -> tuple[int, int | None]:
        return 0, self._blank.shape[0] - 1

    def to(self, device: str | torch.device) -> Host:
        """Move the host; what compares the values of shapes has to be left out where there are none."""
        if torch.device(device).type == "meta":
            embeddings = self._tower_module.embeddings
            embeddings.resize_positional_embeddings = lambda grid, shapes, max_length: grid.new_empty(
                len(shapes), max_length, grid.shape[-1]
            )
        return super().to(device)

    @property
    def _tower_module(self) -> nn.Module:
        return getattr(self.model, "vision_model", self.model)

    @contextmanager
    def picking(self, target: Target) -> Iterator[Pick]:
        def note(_: nn.Module, args: tuple, kwargs: dict) -> None:
            self._shapes = kwargs["spatial_shapes"] if "spatial_shapes" in kwargs else args[2]

        with self._tower_module.register_forward_pre_hook(note, with_kwargs=True), super().picking(target) as pick:
            yield pick

    def marks(self, modality: str, tokens: Tensor, ids: Tensor | None, is_map: bool) -> Marks:
        """Padding is no patch."""
        found = super().marks(modality, tokens, ids, is_map)
        if modality == TEXT or not found.known:
            return found
        real = torch.arange(tokens.shape[1], device=tokens.device) < self._shapes.to(tokens.device).prod(1)[:, None]
        return found._replace(content=real, special=~real)


def _pooled(out: Any) -> Tensor:
    """The embedding that ``get_..._features`` gives."""
    return out if isinstance(out, Tensor) else out.pooler_output


def load_model(
    folder: str, hint: str, device: Any, precision: str, random: bool, **options: Any
) -> tuple[TransformersHost, Loaded]:
    """A host, and which of its weights were in the files.

    Args:
        folder: Hub id or folder.
        hint: How to load it again.
        device: Device that it runs on; ``meta`` for no memory and no weights.
        precision: ``fp32``, or autocast ``bf16`` / ``fp16``.
        random: Take the configuration only.
        **options: Options of ``from_pretrained``: ``dtype`` (of the weights; default float32), ``revision``,
            ``cache_dir``, ``attn_implementation``, ...

    Raises:
        InputError: A family that is not known here, or what the library cannot load.
    """
    import transformers as library

    dtype = dtype_of(options.pop("dtype", None) or options.pop("torch_dtype", None) or torch.float32)
    shared = {k: options[k] for k in ("revision", "cache_dir", "token", "local_files_only") if k in options}
    options.setdefault("ignore_mismatched_sizes", True)  # refused by its caller, with names and shapes
    info = None
    with loading(hint, HostName("transformers", folder)), quiet(folder), silent():
        config = library.AutoConfig.from_pretrained(folder, **shared)
        plain = {"model_type": config.model_type, "architectures": config.architectures}
        if not encodes(plain):
            raise InputError(unknown_family(hint, config.model_type))
        kept = getattr(library, kept_class(plain), None) if kept_class(plain) else None
        if random:
            made = (kept or library.AutoModel)._from_config if kept else library.AutoModel.from_config
            model = made(config, dtype=dtype)
        else:
            cls = kept or library.AutoModel
            model, info = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
        with torch.device("cpu"):
            processor = library.AutoImageProcessor.from_pretrained(folder, **shared)
    found = Loaded(0, [], []) if info is None else _without_pooler(model, Loaded.of(model, info))
    cls = Siglip2Host if config.model_type.startswith("siglip2") else TransformersHost

    tokenizer = partial(load_tokenizer, folder, shared)
    return cls(model, processor, tokenizer, hint, device, precision), found


def load_tokenizer(folder: str, shared: dict[str, Any]) -> Any:
    """The tokenizer of a folder or id; transformers makes an empty one where there are no files of one.

    Raises:
        OSError: There are none.
    """
    import transformers as library
    from transformers.utils import cached_file

    options = {**shared, "_raise_exceptions_for_missing_entries": False}
    if not any(cached_file(folder, name, **options) for name in TOKENIZER_FILES):
        raise OSError(f"{folder} has none of {', '.join(TOKENIZER_FILES)}")
    return library.AutoTokenizer.from_pretrained(folder, **shared)


def _without_pooler(model: nn.Module, found: Loaded) -> Loaded:
    """Many checkpoints (DINO, masked-image ones) have no weights of the pooler that the bare model's class has."""
    if not found.missing or not all(n.startswith("pooler.") for n in found.missing):
        return found
    model.pooler = None
    return Loaded(len(model.state_dict()), [], found.unexpected)
