"""A tiny LLaVA on the frozen image trunk of the tiny CLIP: answers yes/no questions about objects, and captions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmsae.errors import InputError
from mmsae.hosts import loaded, parse
from mmsae.hosts.loaded import quiet
from mmsae.hosts.lvlm.load import load_model
from mmsae.hosts.lvlm.open_clip_tower import TimmTowerConfig
from mmsae.world.generator.data import generate
from mmsae.world.models import loop
from mmsae.world.models.llava.questions import DESCRIBE, NO, OBJECTS, YES, Lessons, ask, shard_lessons, world_lessons
from mmsae.world.models.llava.train import Dialogues, LlavaTraining, image_features, train
from mmsae.world.models.options import ResumedRun, Training
from mmsae.world.models.tokenizer import vocabulary

PAD, UNK, BOS, EOS, IMAGE = "<pad>", "<unk>", "<s>", "</s>", "<image>"
#: LLaVA 1.5's conversation: ``USER: <image>\nQUESTION ASSISTANT: ANSWER</s>``.
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% for c in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in message['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% else %}{{ 'ASSISTANT: ' }}"
    "{% for c in message['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}{{ '</s>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build_tokenizer(texts: Sequence[str], max_words: int = 20_000) -> Any:
    """Word-level tokenizer of the words in ``texts`` and in all that the tiny LLaVA is asked."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = [PAD, UNK, BOS, EOS, IMAGE]
    words = vocabulary([*texts, *map(ask, OBJECTS), ask("shape"), DESCRIBE, YES, NO, "user: assistant:"], max_words)
    vocab = {w: i for i, w in enumerate([*special, *words])}
    t = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    t.normalizer, t.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    t.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])])
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=t, pad_token=PAD, unk_token=UNK, bos_token=BOS, eos_token=EOS, padding_side="left",
        model_input_names=["input_ids", "attention_mask"], extra_special_tokens={"image_token": IMAGE},
    )  # fmt: skip


def build_processor(tokenizer: Any, tower: TimmTowerConfig, preprocess: dict[str, Any]) -> Any:
    """LLaVA's processor, with the CLIP's own image normalisation."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    side = tower.image_size
    images = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, resample=3,
        image_mean=preprocess["mean"], image_std=preprocess["std"],
    )  # fmt: skip
    return LlavaProcessor(
        images, tokenizer, patch_size=tower.patch_size, vision_feature_select_strategy="full",
        num_additional_image_tokens=0, chat_template=TEMPLATE,
    )  # fmt: skip


def read_clip(folder: str | Path) -> tuple[TimmTowerConfig, dict[str, torch.Tensor], dict[str, Any]]:
    """The tower's configuration, trunk and preprocessing (``mean``, ``std``) of a CLIP of ``mmsae pretrain-clip``.

    Raises:
        InputError: The folder is no such CLIP, or its tower is no timm network with maps.
    """
    import timm
    from safetensors.torch import load_file

    path = Path(folder)
    try:
        config = json.loads((path / "open_clip_config.json").read_text())
        vision = config["model_cfg"]["vision_cfg"]
        name, size = vision["timm_model_name"], vision["image_size"]
        weights = load_file(path / "open_clip_model.safetensors")
        info = timm.create_model(name, pretrained=False, features_only=True).feature_info
    except (OSError, KeyError, RuntimeError, json.JSONDecodeError) as e:
        raise InputError(f"{folder} is no open_clip folder with a timm image tower: {e}") from e
    strides, widths = info.reduction(), info.channels()
    fine = next((i for i, s in enumerate(strides) if size // s <= 4), len(strides) - 1)  # 4 x 4 tokens or fewer
    levels = list(range(fine, len(strides)))
    tower = TimmTowerConfig(
        architecture=name, image_size=size, patch_size=strides[fine], levels=levels,
        hidden_size=sum(widths[i] for i in levels),
    )  # fmt: skip
    head = "visual.trunk."
    return tower, {k[len(head) :]: v for k, v in weights.items() if k.startswith(head)}, config["preprocess_cfg"]


def build_model(
    tower: TimmTowerConfig,
    trunk: dict[str, torch.Tensor],
    tokenizer: Any,
    *,
    hidden: int = 128,
    layers: int = 3,
    heads: int = 4,
    context: int = 128,
    seed: int = 0,
) -> Any:
    """``LlavaForConditionalGeneration`` with random language model and projector; the global random state is as before.

    ``initializer_range`` is about ``1 / sqrt(hidden)``: with Llama's default of .02 a model of this width never learns
    to answer yes or no (loss at ln 2 after 845 steps; with .08 it falls within 100).
    """
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    ids = {k: getattr(tokenizer, k) for k in ("pad_token_id", "bos_token_id", "eos_token_id")}
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=context, initializer_range=0.08, **ids,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1, vision_feature_select_strategy="full", initializer_range=0.08, **ids,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    missing = model.model.vision_tower.trunk.load_state_dict(trunk, strict=False)
    if missing.missing_keys:
        raise InputError(f"the CLIP's image trunk lacks {missing.missing_keys[0]} of {tower.architecture}")
    return model


def train_llava(
    data: str | list[str] | int,
    clip: str,
    out: str,
    data_seed: int = 1,
    base: str | None = None,
    hidden: int = 128,
    layers: int = 3,
    training: Training = Training(steps=300),
    run: ResumedRun = ResumedRun(threads=1),
) -> dict[str, Any]:
    """Train a tiny ``LlavaForConditionalGeneration`` and save it with its processor as transformers does.

    The result loads as ``lvlm:OUT``. Fewer steps give a model that hallucinates more. While it runs, OUT.partial holds
    its state: the same call, made again after an interruption, goes on from there.

    Args:
        data: Shards, or a number of scenes to generate. Samples with ``question`` and ``answer`` in their json teach
            these; those of the generated world teach captions and made-up questions; others their caption.
        clip: Folder of a CLIP of ``mmsae pretrain-clip`` whose image trunk becomes the frozen vision tower.
        out: Folder to write the model to.
        data_seed: Seed of generated scenes.
        base: A tiny LLaVA to start from instead of random weights (its tokenizer stays; unknown words read as
            ``<unk>``); ``clip`` is then not read.
        hidden: Width of the language model.
        layers: Number of its layers.
        training: How to train.
        run: Device, threads, and what becomes of OUT.

    Returns:
        What was done: steps, loss, sizes, seconds; OUT/training.json has it too, with the curve of the loss.

    Raises:
        InputError: OUT is in use, or clip, base or data are not usable.
    """
    clock, target = loop.Clock(), loop.free_folder(out, run.overwrite)
    if training.steps < 1 or training.batch_size < 1:
        raise InputError(f"steps {training.steps} and batch_size {training.batch_size} must be at least 1")
    lessons = world_lessons(generate(data, data_seed)) if isinstance(data, int) else shard_lessons(data)
    recipe = LlavaTraining(**vars(training))
    with loop.cpu_threads(run.threads):
        if base is None:
            tower, trunk, preprocess = read_clip(clip)
            tokenizer = build_tokenizer(lessons.texts())
            model = build_model(tower, trunk, tokenizer, hidden=hidden, layers=layers, seed=recipe.seed)
            processor = build_processor(tokenizer, tower, preprocess)
        else:
            model, processor = _from_base(base)
            tower, tokenizer = model.config.vision_config, processor.tokenizer
        model.requires_grad_(True).model.vision_tower.requires_grad_(False)
        model.eval().to(run.device)
        images = processor.image_processor
        if lessons.images.shape[1] != tower.image_size:
            raise InputError(f"the images have {lessons.images.shape[1]} pixels a side, the tower {tower.image_size}")
        features = image_features(model, lessons.images, images.image_mean, images.image_std, run.device)
        if base is None:
            features = _standardise(model.model.vision_tower, features)
        parameters = sum(p.numel() for p in model.parameters())
        if run.progress:
            print(
                f"{len(lessons.images)} images, {len(tokenizer)} tokens in the vocabulary, {features.shape[1]} an"
                f" image; {parameters / 1e6:.2f} M parameters, {recipe.steps} steps of {recipe.batch_size}"
            )
        identity = {
            "recipe": vars(recipe),
            "model": [hidden, layers, str(base)],
            "data": _digest(lessons),
            "trunk": float(features[:64].float().sum()),
        }
        state = loop.RunState(target.with_name(target.name + ".partial"), identity, run.checkpoint_every)
        dialogues = Dialogues(lessons, tokenizer, features.shape[1], recipe)
        found = train(model, features, dialogues, recipe, state, run.progress)
    found |= {"images": len(lessons.images), "parameters": parameters}

    def save(folder: Path) -> None:
        with quiet():
            model.cpu().save_pretrained(folder)
            processor.save_pretrained(folder)

    stats = loop.finish(target, save, recipe, found, clock, run.progress)
    state.file.unlink(missing_ok=True)
    return stats


def _from_base(base: str) -> tuple[Any, Any]:
    """Model and processor of a folder of :func:`train_llava`."""
    parse(f"lvlm:{base}")  # refuses what is no such folder
    model, processor, found = load_model(base, "cpu", "fp32", random=False, dtype="float32")
    loaded.check(f"lvlm:{base}", {"": found}, allow_random=False)
    return model, processor


def _standardise(tower: Any, features: torch.Tensor) -> torch.Tensor:
    """Features of mean 0 and deviation 1 in every channel; the tower does the same from now on."""
    flat = features.flatten(0, 1).float()
    tower.mean.copy_(flat.mean(0))
    tower.scale.copy_(1 / flat.std(0).clamp(min=1e-3))
    mean, scale = tower.mean.cpu(), tower.scale.cpu()
    for i in range(0, len(features), 500):
        features[i : i + 500] = (features[i : i + 500].float() - mean) * scale
    return features


def _digest(lessons: Lessons) -> str:
    h = hashlib.blake2b(np.ascontiguousarray(lessons.images).tobytes(), digest_size=16)
    h.update(lessons.present.tobytes())
    h.update("\0".join(lessons.texts()).encode())
    return h.hexdigest()
