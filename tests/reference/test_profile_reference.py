"""The streamed profile against one ordinary backward pass through the whole model, rules written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lrpq.model.kept import KeptInputs
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.quant.hessian import normalized
from lrpq.relevance.attribute import sum_over_tokens
from lrpq.relevance.composite import Relevance
from lrpq.relevance.head import sequence_generator
from lrpq.relevance.sweep import BlockSums, ProfileSweep, Shard, SiteWeights, merge_block_sums
from lrpq.shards import Node, assign, root, split

WINDOWS, LENGTH, VOCABULARY = 7, 12, 128
NUM_SHARDS, MICRO_BATCH, SEED, FLOOR, POWER = 3, 2, 5, 0.03, 0.5
SITES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
LAYERS = 3
TOKENS = torch.randint(VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(3))
RELEVANCES = [Relevance.FISHER, Relevance.LRP, Relevance.CP_LRP, Relevance.BLEND]
EVERYTHING = 1 << 30


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_llama(tmp_path_factory.mktemp("profile") / "llama", layers=LAYERS, tied=request.param)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # logits of a few units: sampled labels are then not always the likeliest
        model.get_output_embeddings().weight.mul_(0.02)
        if request.param:
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.mul_(0.1)
                layer.mlp.down_proj.weight.mul_(0.1)
    model.save_pretrained(folder)
    return folder


@dataclass
class Profile:
    """Everything a sweep gives, merged."""

    hessians: dict[str, Tensor] = field(default_factory=dict)
    weight_sums: dict[str, float] = field(default_factory=dict)
    curvature: dict[str, Tensor] = field(default_factory=dict)
    traces: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    nats: float = 0.0
    num_tokens: int = 0
    spilled_bytes: int = 0

    def bytes(self) -> dict[str, bytes]:
        parts = {
            "hessian": self.hessians,
            "curvature": self.curvature,
            "traces": self.traces,
            "weights": self.weights,
        }
        return {f"{kind} {name}": x.numpy().tobytes() for kind, found in parts.items() for name, x in found.items()}


def streamed(
    folder: Path,
    relevance: Relevance,
    *,
    num_workers: int = 1,
    memory_bytes: int = EVERYTHING,
    seed: int = SEED,
    power: float = POWER,
) -> Profile:
    """Run the sweep on ``num_workers`` workers, all in this process, and merge what they give."""
    spans = split(WINDOWS, NUM_SHARDS)
    sweeps = [
        ProfileSweep(
            BlockStream(ModelSource(folder), dtype=torch.float32),
            [Shard(index=i, first_window=spans[i].start, tokens=TOKENS[spans[i].start : spans[i].stop]) for i in mine],
            num_shards=NUM_SHARDS,
            relevance=relevance,
            floor=FLOOR,
            power=power,
            seed=seed,
            micro_batch=MICRO_BATCH,
            kept=KeptInputs(memory_bytes=memory_bytes),
        )
        for mine in assign(NUM_SHARDS, num_workers)
    ]
    found = Profile()
    parts: list[dict[Node, BlockSums]] = [{} for _ in range(LAYERS)]
    weights: list[dict[int, SiteWeights]] = [{} for _ in range(LAYERS)]
    for sweep in sweeps:
        sweep.embed()
        for index, block in sweep.stream.stream(range(LAYERS)):
            sweep.forward(index, block)
        nats, num_tokens = sweep.seed_gradients()
        found.nats += nats
        found.num_tokens += num_tokens
        for index, block in sweep.stream.stream(range(LAYERS - 1, -1, -1)):
            nodes, by_shard = sweep.backward(index, block)
            parts[index] |= nodes
            weights[index] |= by_shard
        found.spilled_bytes += sweep.kept.spilled_bytes
        assert sweep.kept.held_bytes == 0  # every input was taken again
        sweep.kept.close()
    for index in range(LAYERS):
        merged = root(parts[index], NUM_SHARDS, merge_block_sums)
        assert merged.num_tokens == WINDOWS * LENGTH
        for site, hessian in merged.hessians.items():
            assert hessian.num_tokens == WINDOWS * LENGTH
            found.hessians[f"{index}.{site}"] = normalized(hessian) * hessian.weight_sum
            found.weight_sums[f"{index}.{site}"] = hessian.weight_sum
            by_shard_of_site = [weights[index][shard].values[site] for shard in range(NUM_SHARDS)]
            found.weights[f"{index}.{site}"] = torch.cat(by_shard_of_site)
        found.curvature |= {name: g2 / merged.num_tokens for name, g2 in merged.curvature.items()}
        found.traces |= {name: trace / merged.num_tokens for name, trace in merged.traces.items()}
    return found


# --- the reference --------------------------------------------------------------------------------


def gradients(folder: Path, rules: str, labels: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Inputs x [n, t, d_in] and output gradients [n, t, d_out] of every linear layer, and the loss in nats."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    model.requires_grad_(False)
    if rules != "fisher":
        _put_rules_in(model, rules)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        def hook(_: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
            inputs[name], outputs[name] = arguments[0].detach(), output
            # AttnLRP: a quarter of the gradient for q and k, half for v; CP-LRP: the pattern is a constant.
            kind = name.rsplit(".", 1)[-1]
            shares = {"lrp": {"q_proj": 0.25, "k_proj": 0.25, "v_proj": 0.5}, "cp-lrp": {"q_proj": 0.0, "k_proj": 0.0}}
            share = shares.get(rules, {}).get(kind, 1.0)
            return share * output + (1.0 - share) * output.detach()

        return hook

    for name in names():
        model.get_submodule(name).register_forward_hook(remember(name))
    embedded = model.get_input_embeddings()(TOKENS).requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    nats = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    found = torch.autograd.grad(nats, list(outputs.values()), allow_unused=True, materialize_grads=True)
    return inputs, dict(zip(outputs, found, strict=True)), float(nats.detach())


def _put_rules_in(model: Any, rules: str) -> None:
    def norm(module: Any) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).detach()
            return module.weight * (x * scale)

        return forward

    def mlp(module: Any) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            z = module.gate_proj(x)
            gate = z * (nn.functional.silu(z) / z).detach()
            if rules == "cp-lrp":
                return module.down_proj(gate.detach() * module.up_proj(x))
            product = gate * module.up_proj(x)
            return module.down_proj(0.5 * product + 0.5 * product.detach())

        return forward

    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = norm(module)
        elif type(module).__name__ == "LlamaMLP":
            module.forward = mlp(module)


def names() -> list[str]:
    return [f"model.layers.{i}.{name}" for i in range(LAYERS) for members in SITES.values() for name in members]


def sampled_labels(folder: Path, seed: int) -> Tensor:
    """One label a token by inverting the distribution, one generator a window."""
    with torch.no_grad():
        p = AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits.softmax(-1).double()
    uniform = torch.stack(
        [torch.rand(LENGTH, dtype=torch.float64, generator=sequence_generator(seed, i)) for i in range(WINDOWS)]
    )
    return (p.cumsum(-1) <= (uniform * p.sum(-1))[..., None]).sum(-1).clamp(max=VOCABULARY - 1)


def micro_batches() -> list[range]:
    """Windows that are computed at once: shards are cut, not the whole set."""
    cuts = []
    for span in split(WINDOWS, NUM_SHARDS):
        cuts += [range(a, min(a + MICRO_BATCH, span.stop)) for a in range(span.start, span.stop, MICRO_BATCH)]
    return cuts


def expected(folder: Path, relevance: Relevance, *, power: float = POWER) -> Profile:
    """The profile from whole-model gradients, in float64 from there on."""
    labels = sampled_labels(folder, SEED)
    inputs, fisher, nats = gradients(folder, "fisher", labels)
    rules = "cp-lrp" if relevance is Relevance.CP_LRP else "lrp"
    _, modified, _ = gradients(folder, rules, labels)
    found = Profile(nats=nats, num_tokens=labels.numel())
    for name in names():
        g2 = fisher[name].double().square().flatten(0, 1)
        found.curvature[name] = g2.mean(0)
        products = g2.sum(1) * inputs[name].double().square().flatten(0, 1).sum(1)
        found.traces[name] = products.view(WINDOWS, LENGTH).sum(1) / labels.numel()
    for index in range(LAYERS):
        for site, members in SITES.items():
            modules = [f"model.layers.{index}.{member}" for member in members]
            parts = []
            for windows in micro_batches():
                s_f = torch.stack([fisher[m][windows].double().square().mean(-1).flatten() for m in modules])
                s_l = torch.stack([modified[m][windows].double().square().mean(-1).flatten() for m in modules])
                if relevance is Relevance.FISHER:
                    s = s_f
                elif relevance is Relevance.BLEND:
                    s = (s_f * s_l).sqrt()
                    s = s * (s_f.mean(1) / s.mean(1))[:, None]
                else:
                    s = s_l
                s = s.mean(0)
                parts.append((s + FLOOR * s.mean()) ** power)
            s, key = torch.cat(parts), f"{index}.{site}"
            X = inputs[modules[0]].double().flatten(0, 1)
            found.weights[key] = s
            found.hessians[key] = (X * s[:, None]).T @ X
            found.weight_sums[key] = float(s.sum())
    return found


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


# --- what must hold -------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("relevance", RELEVANCES, ids=lambda r: r.value)
def test_profile_equals_one_backward_pass_through_the_whole_model(
    folder: Path, relevance: Relevance, power: float
) -> None:
    found, wanted = streamed(folder, relevance, power=power), expected(folder, relevance, power=power)
    assert found.num_tokens == wanted.num_tokens
    assert found.nats == pytest.approx(wanted.nats, rel=1e-5)
    assert found.curvature.keys() == wanted.curvature.keys()
    for name, c in found.curvature.items():
        assert c.dtype == torch.float64
        assert distance(c, wanted.curvature[name]) < 1e-4, name
    assert found.traces.keys() == wanted.traces.keys()
    for name, trace in found.traces.items():
        assert trace.dtype == torch.float64
        assert trace.tolist() == pytest.approx(wanted.traces[name].tolist(), rel=1e-4), name  # window by window
    assert found.hessians.keys() == wanted.hessians.keys()
    for key in wanted.hessians:
        assert distance(found.weights[key], wanted.weights[key]) < 1e-4, key
        assert distance(found.hessians[key], wanted.hessians[key]) < 1e-4, key
        assert found.weight_sums[key] == pytest.approx(wanted.weight_sums[key], rel=1e-4), key


def test_the_kinds_of_relevance_differ_in_the_weights_and_not_in_the_curvature(folder: Path) -> None:
    profiles = {relevance: streamed(folder, relevance) for relevance in (*RELEVANCES, Relevance.NONE)}
    for relevance, profile in profiles.items():
        for name, c in profile.curvature.items():
            assert torch.equal(c, profiles[Relevance.FISHER].curvature[name])
        for other in profiles:
            for key in profile.hessians if other is not relevance else ():
                a = profile.hessians[key] / profile.weight_sums[key]
                b = profiles[other].hessians[key] / profiles[other].weight_sums[key]
                # above the last layers the rules have had nothing to change yet but the scale of whole sites
                if key not in {f"{LAYERS - 1}.down"} or Relevance.NONE in (relevance, other):
                    assert distance(a, b.double()) > 1e-3, (key, relevance, other)


@pytest.mark.parametrize("relevance", [Relevance.FISHER, Relevance.BLEND], ids=lambda r: r.value)
def test_bytes_do_not_depend_on_how_shards_are_shared_out(folder: Path, relevance: Relevance) -> None:
    one = streamed(folder, relevance).bytes()
    for num_workers in (2, 3, 5):  # with five workers two of them have nothing to do
        assert streamed(folder, relevance, num_workers=num_workers).bytes() == one
    assert streamed(folder, relevance, seed=SEED + 1).bytes() != one


@pytest.mark.parametrize("memory_bytes", [0, 20_000])
def test_inputs_spilled_to_disk_give_the_same_bytes(folder: Path, memory_bytes: int) -> None:
    held = streamed(folder, Relevance.BLEND)
    spilled = streamed(folder, Relevance.BLEND, memory_bytes=memory_bytes)
    assert held.spilled_bytes == 0
    all_bytes = LAYERS * WINDOWS * LENGTH * 64 * 4
    assert all_bytes - memory_bytes <= spilled.spilled_bytes <= all_bytes
    assert spilled.bytes() == held.bytes()


@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 100])
def test_sums_over_tokens_keep_what_fp64_has(tokens: int) -> None:
    random = torch.Generator().manual_seed(tokens)
    squares = (torch.randn(tokens, 5, generator=random) * torch.randn(tokens, 1, generator=random).exp()).square()
    found, exact = sum_over_tokens(squares), squares.double().sum(0)
    assert found.dtype is torch.float64
    assert torch.allclose(found, exact, rtol=2.0**-18, atol=0.0)
    assert torch.allclose(sum_over_tokens(squares.double()), exact, rtol=1e-14, atol=0.0)
