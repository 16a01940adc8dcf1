"""Train a small image classifier to measure on: a ViT, DeiT or Swin of transformers, from nothing, on CIFAR-10.

    python -m benchmarks.vision_train --model vit-tiny --data FOLDER --output DIR [--compile] [--graph]

``FOLDER`` holds train.npz and test.npz (benchmarks/vision_images.py). The whole set lies on the device, and is
augmented there. The time is the schedule: the learning rate follows a cosine over ``--minutes`` of wall time, however
many epochs that is, so a run is repeatable in its outcome, not bit for bit. Saved are the averaged weights in bfloat16
(``model.safetensors``), ``config.json``, ``preprocessor_config.json`` and ``training.json`` with the accuracy over
time; the last figure is that of the model loaded again from there, in float32.

With ``--compile --graph`` one H100 for itself needs the default of 5.5 minutes for a top-1 of 85% or more on 5,000 test
images: vit-tiny 86.2% (5.5 minutes, 185 epochs), deit-tiny 85.2% (5 minutes), swin-tiny 88.8% (6 minutes). Launched
one by one instead of as a graph, or beside another training, steps take several times as long.

The recipe is DeiT's (Touvron et al. 2021), shorter: AdamW, warm-up and cosine, mixup or CutMix in half of the batches,
label smoothing, erasing, an exponential average of the weights. Inputs are 32 x 32: patches of 4 (Swin: 2, windows of
4, stages of 16, 8 and 4 patches a side), width 192 and 12 blocks (Swin: 96 to 384 and 2, 4, 2 blocks, 5.9 million
parameters).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from benchmarks.vision_images import MEAN, STD, Images, augment, load_images, mix, mixings, normalize

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
WARM_UP = 0.1
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


class Step:
    """One step of training on images that lie on the device: everything from the draw to the average, and no word to
    the host, so that on a GPU it can be captured once and replayed."""

    def __init__(self, model: nn.Module, images: Images, options: argparse.Namespace) -> None:
        device, size = images.labels.device, images.pixels.shape[-1]
        self.model, self.images = model, images
        self.forward: Any = torch.compile(model) if options.compile else model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.averaged = copy.deepcopy(model).eval()
        self.averages = [p.detach() for p in self.averaged.parameters()]
        self.rate = torch.zeros((), device=device)
        gpu = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            decayed(model, options.weight_decay), lr=self.rate, betas=(0.9, 0.999), fused=gpu, capturable=gpu
        )
        self.index = torch.zeros(options.batch, dtype=torch.int64, device=device)
        self.share = torch.ones((), device=device)
        self.outside = torch.ones(size, size, device=device)
        self.loss = torch.zeros((), device=device)
        """Sum of the steps' losses; whoever reads it sets it to zero."""
        self.graph: torch.cuda.CUDAGraph | None = None

    def prepare(self, *, graph: bool) -> None:
        """Compile and warm up, at a rate of zero, and capture."""
        with torch.cuda.stream(torch.cuda.Stream()) if graph else nullcontext():
            for _ in range(4):
                self._step()
        if graph:
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._step()
        self.loss.zero_()

    def __call__(self, index: Tensor, share: Tensor, outside: Tensor, rate: float) -> None:
        self.index.copy_(index)
        self.share.copy_(share)
        self.outside.copy_(outside)
        self.rate.fill_(rate)
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()

    def _step(self) -> None:
        labels, classes = self.images.labels[self.index], len(self.images.classes)
        right = labels[:, None] == torch.arange(classes, device=labels.device)
        targets = right.float() * (1 - SMOOTHING) + SMOOTHING / classes
        x, targets = mix(augment(self.images.pixels[self.index]), targets, self.share, self.outside)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, cache_enabled=False):
            logits = self.forward(pixel_values=x).logits
        loss = F.cross_entropy(logits.float(), targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.parameters, 1 - AVERAGE_DECAY)
            self.loss += loss.detach()


def train(model: nn.Module, images: Images, test: Images, options: argparse.Namespace) -> tuple[nn.Module, list[Any]]:
    """Train for ``options.minutes``; returns the averaged model and the accuracy over time."""
    device = images.labels.device
    host = np.random.default_rng(options.seed)
    model.train()
    step = Step(model, images, options)
    step.prepare(graph=options.graph)
    count = len(images.labels) // options.batch
    started = time.monotonic()
    rows: list[Any] = []
    epoch, progress, shown, loss = 0, 0.0, 0.0, math.inf
    while progress < 1:
        order = torch.randperm(len(images.labels), device=device)[: count * options.batch].view(count, -1)
        mixing = mixings(count, SIZE, host, chance=options.mixing).to(device)
        taken = 0
        for index, share, outside in zip(order, mixing.share, mixing.outside, strict=True):
            progress = min((time.monotonic() - started) / (60 * options.minutes), 1.0)
            if progress >= 1:
                break
            step(index, share, outside, learning_rate(progress, options.rate))
            taken += 1
        loss = float(step.loss) / taken if taken else loss  # waits for the device
        step.loss.zero_()
        epoch += bool(taken)
        if progress >= 1 or progress >= shown:
            row = {
                "epoch": epoch,
                "seconds": round(time.monotonic() - started, 1),
                "loss": loss,
                "top1": top1(model, test, autocast=True),
                "averaged_top1": top1(step.averaged, test, autocast=True),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
            shown = progress + 0.1
    return step.averaged, rows


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
    parser.add_argument("--minutes", type=float, default=5.5, help="of training, evaluation in it; loading is not")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=5e-4, help="highest learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--mixing", type=float, default=0.5, help="share of batches with mixup or CutMix")
    parser.add_argument("--compile", action="store_true", help="by torch.compile")
    parser.add_argument("--graph", action="store_true", help="capture the step as a CUDA graph")
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
