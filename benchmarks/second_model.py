"""A second language model to measure on: a Qwen3 of another shape that learns the next-token distributions of a first.

    python -m benchmarks.second_model TEACHER --text FILE [FILE ...] --output DIR [--steps 1500] [--device cuda]

What was looked at on one model (how near the predicted divergence is, say) is to be tested on another, whose weights
come from nowhere near: they start at random, in another architecture (norms of q and k, 12 blocks, hidden 512), and
follow the teacher's distributions over the teacher's vocabulary (Hinton et al. 2015, arXiv:1503.02531, at temperature
1). A twentieth of the text, the end of the last file, is not trained on; what the model is worth is printed from the
first ``--batch`` windows there. Written as bfloat16, with the teacher's tokenizer and ``training.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

HELD_OUT = 20
"""Of so many tokens one is held out."""
ROWS = 2048
"""Tokens whose logits are in memory at once."""
HEADS_OF = 128
"""Hidden size for each head of keys and values and its two of queries."""
WARM_UP = 0.05
"""Share of the steps in which the learning rate rises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How it is trained."""

    steps: int
    batch: int
    length: int
    rate: float

    def rate_at(self, step: int) -> float:
        """Warm-up and cosine."""
        warm = max(1, round(WARM_UP * self.steps))
        if step < warm:
            return self.rate * (step + 1) / warm
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


def student(teacher: PreTrainedModel, *, hidden: int, layers: int, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights for the teacher's vocabulary."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=teacher.config.vocab_size,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2 * hidden // HEADS_OF,
        num_key_value_heads=hidden // HEADS_OF,
        head_dim=HEADS_OF // 2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=teacher.config.bos_token_id,
        eos_token_id=teacher.config.eos_token_id,
    )
    return Qwen3ForCausalLM(config)


def divergence(
    teacher: PreTrainedModel, model: PreTrainedModel, tokens: Tensor, *, backward: bool = False
) -> tuple[float, float]:
    """Mean KL divergence of the model from the teacher and the text's mean negative log-likelihood, nats a token.

    Args:
        teacher: whose distributions are wanted.
        model: whose are compared.
        tokens: windows [n, length].
        backward: add the gradients of the divergence to the model's; some rows of logits are in memory at a time.
    """
    with torch.no_grad():
        wanted = teacher.model(tokens).last_hidden_state[:, :-1].flatten(0, 1)
    with torch.set_grad_enabled(backward):
        found = model.model(tokens).last_hidden_state[:, :-1].flatten(0, 1)
    labels = tokens[:, 1:].flatten()
    leaf = found.detach().requires_grad_(backward)
    kl, nll = torch.zeros((), device=tokens.device), torch.zeros((), device=tokens.device)
    for rows in torch.arange(len(labels), device=tokens.device).split(ROWS):
        with torch.no_grad():
            target = teacher.lm_head(wanted[rows]).float().log_softmax(-1)
        with torch.set_grad_enabled(backward):
            logs = model.lm_head(leaf[rows]).float().log_softmax(-1)
            part = F.kl_div(logs, target, reduction="sum", log_target=True) / len(labels)
        if backward:
            part.backward()
        kl += part.detach()
        nll += F.nll_loss(logs.detach(), labels[rows], reduction="sum") / len(labels)
    if backward:
        found.backward(leaf.grad)
    return float(kl), float(nll)


def train(teacher: PreTrainedModel, model: PreTrainedModel, tokens: Tensor, schedule: Schedule, *, seed: int) -> None:
    """Train the model on random windows of the tokens, saying how it goes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.rate, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(seed)
    places = torch.arange(schedule.length)
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        starts = torch.randint(len(tokens) - schedule.length, (schedule.batch, 1), generator=generator)
        with torch.autocast(tokens.device.type, torch.bfloat16):
            kl, nll = divergence(teacher, model, tokens[(starts + places).to(tokens.device)], backward=True)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == schedule.steps - 1:
            print(f"step {step}: divergence from the teacher {kl:.3f}, perplexity {math.exp(nll):.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--hidden", type=int, default=512, help="a multiple of 128")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.hidden < HEADS_OF or options.hidden % HEADS_OF:
        parser.error(f"--hidden {options.hidden}: expected a multiple of {HEADS_OF}")
    began = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    texts = (path.read_text(encoding="utf-8") for path in options.text)
    ids = [token for text in texts for token in tokenizer(text, verbose=False)["input_ids"]]
    if len(ids) < 2 * HELD_OUT * options.length:
        raise SystemExit(f"{len(ids)} tokens of text: give at least {2 * HELD_OUT * options.length}")
    tokens = torch.tensor(ids, device=options.device)
    cut = len(tokens) - math.ceil(len(tokens) / HELD_OUT)
    training, held_out = tokens[:cut], tokens[cut:]
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.bfloat16).to(options.device).eval()
    if getattr(teacher.config, "final_logit_softcapping", None) is not None:
        raise SystemExit(f"{options.teacher}: its logits are capped, which is not done here; give another teacher")
    model = student(teacher, hidden=options.hidden, layers=options.layers, seed=options.seed).to(options.device)
    schedule = Schedule(steps=options.steps, batch=options.batch, length=options.length, rate=options.rate)
    train(teacher, model, training, schedule, seed=options.seed)
    model.to(torch.bfloat16).save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    written = AutoModelForCausalLM.from_pretrained(options.output, dtype=torch.bfloat16).to(options.device).eval()
    windows = held_out[: len(held_out) // options.length * options.length].view(-1, options.length)[: options.batch]
    kl, nll = divergence(teacher, written, windows)
    own = divergence(teacher, teacher, windows)[1]
    found = {
        "steps": options.steps,
        "training_tokens": len(training),
        "held_out_divergence": kl,
        "held_out_perplexity": math.exp(nll),
        "teachers_held_out_perplexity": math.exp(own),
        "seconds": time.perf_counter() - began,
    }
    (options.output / "training.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
