"""Train a small image classifier to measure on: a ViT, DeiT or Swin of transformers, from nothing, on CIFAR-10.

    python -m benchmarks.vision_train --model vit-tiny --data FOLDER --output DIR [--minutes 7.5] [--compile]

``FOLDER`` holds train.npz and test.npz (benchmarks/vision_images.py). The whole set lies on the device, and is
augmented there. The time is the schedule: the learning rate follows a cosine over ``--minutes`` of wall time, however
many epochs that is, so a run is repeatable in its outcome, not bit for bit. Saved are the averaged weights in bfloat16
(``model.safetensors``), ``config.json``, ``preprocessor_config.json`` and ``training.json`` with the accuracy over
time; the last figure is that of the model loaded again from there, in float32.

The recipe is DeiT's (Touvron et al. 2021), shorter: AdamW, warm-up and cosine, mixup or CutMix in every batch, label
smoothing, erasing, an exponential average of the weights. Inputs are 32 x 32: patches of 4 (Swin: 2, windows of 4,
stages of 16, 8 and 4 patches a side), width 192 and 12 blocks (Swin: 96 to 384 and 2, 4, 2
blocks, 5.9 million parameters).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from benchmarks.vision_images import MEAN, STD, Images, augment, load_images, mix, normalize

SIZE = 32
_PLAIN: Mapping[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "image_size": SIZE,
    "patch_size": 4,
}
_SWIN: Mapping[str, Any] = {
    "embed_dim": 96,
    "depths": [2, 4, 2],
    "num_heads": [3, 6, 12],
    "window_size": 4,
    "image_size": SIZE,
    "patch_size": 2,
}
MODELS: Mapping[str, Callable[..., Any]] = {
    "vit-tiny": lambda **labels: ViTForImageClassification(ViTConfig(**_PLAIN, **labels)),
    "deit-tiny": lambda **labels: DeiTForImageClassification(DeiTConfig(**_PLAIN, **labels)),
    "swin-tiny": lambda **labels: SwinForImageClassification(SwinConfig(**_SWIN, **labels)),
}
WARM_UP = 0.05
"""Share of the time in which the learning rate rises."""
SMOOTHING = 0.1
AVERAGE_DECAY = 0.999


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up, then a cosine to zero; ``progress`` in [0, 1]."""
    if progress < WARM_UP:
        return peak * progress / WARM_UP
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def decayed(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices and filters decay; biases, norms, tokens and positions do not."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decay = [p for name, p in named if p.ndim in (2, 4) and "position" not in name]
    rest = [p for name, p in named if not (p.ndim in (2, 4) and "position" not in name)]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


@torch.no_grad()
def top1(model: nn.Module, images: Images, *, autocast: bool, batch: int = 1000) -> float:
    """Share of images whose class has the highest logit."""
    training = model.training
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=images.labels.device)
    for start in range(0, len(images.labels), batch):
        x = normalize(images.pixels[start : start + batch])
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast):
            logits = model(pixel_values=x).logits
        right += (logits.argmax(dim=-1) == images.labels[start : start + batch]).sum()
    model.train(training)
    return int(right) / len(images.labels)


def train(model: nn.Module, images: Images, test: Images, options: argparse.Namespace) -> tuple[nn.Module, list[Any]]:
    """Train for ``options.minutes``; returns the averaged model and the accuracy over time."""
    device = images.labels.device
    generator = torch.Generator(device).manual_seed(options.seed)
    host = np.random.default_rng(options.seed)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY))
    optimizer = torch.optim.AdamW(
        decayed(model, options.weight_decay), lr=0.0, betas=(0.9, 0.999), fused=device.type == "cuda"
    )
    forward: Any = torch.compile(model) if options.compile else model

    def step(index: Tensor, rate: float) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = rate
        smooth = torch.full((len(index), len(images.classes)), SMOOTHING / len(images.classes), device=device)
        targets = smooth.scatter_add(1, images.labels[index, None], smooth.new_full((len(index), 1), 1 - SMOOTHING))
        x, targets = mix(augment(images.pixels[index], generator), targets, generator, host)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = forward(pixel_values=x).logits
        loss = F.cross_entropy(logits.float(), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        averaged.update_parameters(model)
        return loss.detach()

    def order() -> Tensor:
        return torch.randperm(len(images.labels), generator=generator, device=device)

    model.train()
    for index in order().split(options.batch)[:2]:  # compiles and warms up; a rate of zero changes nothing
        float(step(index, 0.0))
    started = time.monotonic()
    rows: list[Any] = []
    epoch, progress, shown, loss = 0, 0.0, 0.0, math.inf
    while progress < 1:
        losses = []
        for index in order().split(options.batch):
            progress = min((time.monotonic() - started) / (60 * options.minutes), 1.0)
            if progress >= 1 or (len(index) < options.batch and losses):
                break
            losses.append(step(index, learning_rate(progress, options.rate)))
        loss = float(torch.stack(losses).mean()) if losses else loss  # waits for the device
        epoch += bool(losses)
        if progress >= 1 or progress >= shown:
            seconds = time.monotonic() - started
            row = {
                "epoch": epoch,
                "seconds": round(seconds, 1),
                "loss": loss,
                "top1": top1(model, test, autocast=True),
                "averaged_top1": top1(averaged.module, test, autocast=True),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
            shown = progress + 0.04
    return averaged.module, rows


def save(model: Any, folder: Path) -> None:
    """Write the checkpoint in bfloat16, as transformers reads it, and how its inputs are made."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": SIZE, "width": SIZE},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of train.npz and test.npz")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=7.5, help="of training, evaluation in it; loading is not")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="by torch.compile")
    parser.add_argument("--images", type=int, help="of the training and of the test set at most, for a trial")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    started = time.monotonic()
    images, test = (load_images(options.data / f"{n}.npz", first=options.images).to(device) for n in ("train", "test"))
    names = dict(enumerate(images.classes))
    model = MODELS[options.model](id2label=names, label2id={name: i for i, name in names.items()}).to(device)
    count = sum(p.numel() for p in model.parameters())
    print(f"{options.model}: {count:,} parameters; {len(images.labels):,} images, loaded in ", end="")
    print(f"{time.monotonic() - started:.1f} s; {len(test.labels):,} test images; {device}", flush=True)
    averaged, rows = train(model, images, test, options)
    save(averaged, options.output)
    again = AutoModelForImageClassification.from_pretrained(options.output, dtype=torch.float32).to(device)
    accuracy = top1(again, test, autocast=False, batch=500)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    record = {
        "model": options.model,
        "parameters": count,
        "top1": accuracy,
        "test_images": len(test.labels),
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k not in _PLACES},
        "machine": machine,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "rows": rows,
    }
    (options.output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    size = (options.output / "model.safetensors").stat().st_size
    print(f"{options.model}: top-1 {100 * accuracy:.2f}% on {len(test.labels):,} test images, loaded again in float32;")
    print(f"model.safetensors {size:,} bytes; {rows[-1]['epoch']} epochs; {time.monotonic() - started:.0f} s in all")


_PLACES = frozenset({"data", "output"})

if __name__ == "__main__":
    main()
