"""Perplexity and KL divergence of a dense checkpoint against its original, by plain transformers.

    python -m benchmarks.peers.ruler REFERENCE CHECKPOINT --text FILE [--windows 32] [--length 512] [--device cpu]

Both models compute in bfloat16; log-probabilities and sums are float32. The windows are spread evenly over the text,
and each begins with the BOS token where the tokenizer adds one. One JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def windows_of(text: str, tokenizer: AutoTokenizer, *, windows: int, length: int) -> torch.Tensor:
    """Token ids, [windows, length]; fewer windows where the text is short.

    Raises:
        SystemExit: it does not fill one.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    filled = len(ids) // length
    if not filled:
        raise SystemExit(f"{len(ids)} tokens, fewer than one window of {length}")
    count = min(windows, filled)
    chosen = ids[: filled * length].view(filled, length)[:: filled // count][:count]
    if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        begin = torch.full((count, 1), tokenizer.bos_token_id)
        return torch.cat([begin, chosen[:, :-1]], dim=1)
    return chosen


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.reference)
    text = arguments.text.read_text(encoding="utf-8")
    windows = windows_of(text, tokenizer, windows=arguments.windows, length=arguments.length)
    original, other = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(arguments.device).eval()
        for folder in (arguments.reference, arguments.checkpoint)
    )
    nll, kl = [], []
    for window in windows.to(arguments.device):
        p, q = (model(window[None]).logits[0, :-1].float().log_softmax(-1) for model in (original, other))
        if not bool(torch.isfinite(q).all()):
            raise SystemExit(f"{arguments.checkpoint}: logits that are not finite")
        nll.append([float(torch.nn.functional.nll_loss(r, window[1:])) for r in (p, q)])
        kl.append(float((p.exp() * (p - q)).sum(-1).mean()))
    means = torch.tensor(nll, dtype=torch.float64).mean(0)
    divergence = torch.tensor(kl, dtype=torch.float64)
    error = float(divergence.std() / math.sqrt(len(kl))) if len(kl) > 1 else None
    found = {
        "windows": len(kl),
        "length": windows.shape[1],
        "perplexity_reference": math.exp(means[0]),
        "perplexity": math.exp(means[1]),
        "kl_nats_per_token": float(divergence.mean()),
        "kl_standard_error": error,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
