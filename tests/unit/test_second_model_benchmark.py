"""The model that benchmarks train to measure on learns what it is to learn."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import write_llama
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from benchmarks.second_model import Schedule, divergence, student, train


def test_the_divergence_and_its_gradients_are_those_of_plain_autograd(tmp_path: Path) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(write_llama(tmp_path / "m")).eval()
    model = student(teacher, hidden=128, layers=1, seed=0)
    tokens = torch.randint(0, 128, (3, 9), generator=torch.Generator().manual_seed(1))
    kl, nll = divergence(teacher, model, tokens, backward=True)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logs = model(tokens).logits[:, :-1].log_softmax(-1)
    wanted = teacher(tokens).logits[:, :-1].log_softmax(-1).detach()
    expected = (wanted.exp() * (wanted - logs)).sum(-1).mean()
    expected.backward()
    torch.testing.assert_close(kl, float(expected.detach()), rtol=1e-5, atol=1e-6)
    text = F.nll_loss(logs.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(nll, float(text.detach()), rtol=1e-5, atol=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)


def test_it_comes_nearer_to_its_teacher(tmp_path: Path) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(write_llama(tmp_path / "m")).eval()
    with torch.no_grad():
        teacher.lm_head.weight.mul_(8)  # distributions with something to learn
    model = student(teacher, hidden=128, layers=1, seed=0)
    tokens = torch.randint(0, 128, (400,), generator=torch.Generator().manual_seed(2))
    before, _ = divergence(teacher, model, tokens.view(-1, 20))
    train(teacher, model, tokens, Schedule(steps=120, batch=8, length=20, rate=3e-3), seed=0)
    after, _ = divergence(teacher, model, tokens.view(-1, 20))
    assert after < 0.7 * before
