"""One model and one set of calibration tokens: evidence, codes and scores, each computed once.

Everything is the core's own streamed sweeps in one process, so it runs wherever torch does. Memory: one block's
weights, the streams' hidden states, and of every module its costs and token weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lrpq.allocate.problem import CostRow
from lrpq.compare.codes import Codes, DenseCodes, on_host
from lrpq.compare.recipes import TUNINGS, Recipe, Rounding
from lrpq.compare.terms import Terms
from lrpq.errors import CalibrationError, QuantizationError
from lrpq.evaluate.divergence import VARIANT, WindowScore, score_windows
from lrpq.importance.asked import Asked, asked_by
from lrpq.importance.evidence import ModuleEvidence
from lrpq.importance.gather import BlockEvidence, GatherSweep, ModuleSums, means
from lrpq.importance.registry import Measure
from lrpq.importance.weightings import ATTENTION
from lrpq.model.host_copies import HostCopies
from lrpq.model.kept import KeptInputs
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import gptq
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.hessian import normalized
from lrpq.quant.packing import storage_bits
from lrpq.quant.rtn import round_to_nearest
from lrpq.quant.side_by_side import quantize_side_by_side
from lrpq.refine.products import SiteProducts, merge_products
from lrpq.refine.quantize import quantize_refined
from lrpq.refine.sweep import QuantizedActivations, RefineSweep
from lrpq.relevance.composite import Relevance
from lrpq.relevance.outputs import Outputs
from lrpq.relevance.rules import Pass
from lrpq.relevance.sweep import Shard
from lrpq.shards import root, split
from lrpq.transform.exponents import ScaledSource
from lrpq.transform.magnitudes import choose_exponents
from lrpq.tune.options import Trained, TuneOptions
from lrpq.tune.run import tune
from lrpq.tune.weights import dense_weights

if TYPE_CHECKING:
    from jaxtyping import Int

Rebuild = Callable[[int, nn.Module, Mapping[str, QuantizedWeight]], Mapping[str, QuantizedWeight]]
"""From a block, its original weights and its codes to better codes for the same modules."""
KEPT_BYTES = 8 << 30
"""Host memory for kept block inputs before they spill to disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """What a method makes of a model."""

    codes: Codes
    vectors: Mapping[str, Tensor]
    """Gains that were tuned, by name of the parameter."""


@dataclass(slots=True, kw_only=True)
class Gathered:
    """What one walk back gave."""

    costs: dict[str, list[CostRow]] = field(default_factory=dict)
    """Measure -> a row for every module and choice."""
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """Ranking measure -> module -> importance."""
    token_weights: dict[str, dict[int, dict[str, Tensor]]] = field(default_factory=dict)
    """Weighting -> block -> site -> s of all tokens."""
    outputs: dict[str, Outputs] = field(default_factory=dict)
    """Module -> second moments of the gradients at its outputs, on the host; empty unless asked for."""
    candidates: dict[str, list[QuantizedWeight]] = field(default_factory=dict)
    """Module -> GPTQ candidates on the original inputs, on the host; empty unless they are kept."""


class Workbench:
    """Args:
    source: the model.
    tokens: calibration windows.
    terms: what all methods share.
    held_out: windows of the same text that nothing is calibrated on; what is tuned is chosen by them.
    """

    def __init__(
        self,
        source: ModelSource,
        tokens: Int[Tensor, "windows length"],
        terms: Terms,
        *,
        held_out: Int[Tensor, "held_out length"] | None = None,
    ) -> None:
        self.source, self.tokens, self.terms, self.held_out = source, tokens, terms, held_out

    def scaled(self) -> Workbench:
        """The same for a model scaled by powers of two, where the terms' scales have 8 bits; else itself.

        Raises:
            ModelError: scaling would round.
        """
        if self.terms.scale_bits == 16:
            return self
        source = ScaledSource(self.source, choose_exponents(self.source))
        return Workbench(source, self.tokens, self.terms, held_out=self.held_out)

    def stream(self, attention: str | None = None) -> BlockStream:
        """The model, opened anew."""
        return BlockStream(self.source, dtype=self.terms.dtype, device=self.terms.device, attention=attention)

    def gather(
        self,
        measures: Mapping[str, Measure],
        *,
        weightings: Sequence[str],
        candidates_by: str,
        keep_candidates: bool = False,
        with_outputs: bool = False,
        at: Codes | None = None,
    ) -> Gathered:
        """Evaluate measures and token weights: one walk back through the model, and one more each for the text's own
        labels and for attention weights.

        Args:
            measures: by name.
            weightings: token weightings to keep.
            candidates_by: weighting whose Hessian the candidates are quantized by.
            keep_candidates: keep all candidates of all modules in host memory.
            with_outputs: also gather what rows of a layer need to make up for each other's errors.
            at: take gradients and Hessians at the model with these codes; weights and candidates stay the original's.
        """
        # attention weights need another kernel, which must not move the rows of methods that do not ask for them
        asked = asked_by(measures, weightings, candidates_by=candidates_by, with_outputs=with_outputs)
        text: dict[str, ModuleSums] = {}
        if any(measure.text_labels for measure in measures.values()):
            for evidence in self.walk_back(weightings=(), text_labels=True, at=at):
                text |= evidence.modules
        found = Gathered(token_weights={name: {} for name in (*asked.weightings, *weightings)})
        stream = self.stream()
        blocks = range(stream.num_blocks - 1, -1, -1)
        outputs: dict[str, list[Future[Tensor]]] = {}
        with closing(HostCopies(stream.device)) as copies:
            for block, evidence in zip(blocks, self.evidence(asked, at=at, stream=stream), strict=True):
                for name in asked.weightings:
                    found.token_weights[name][block] = evidence.weights[name]
                outputs |= {name: [_leaving(G, copies) for G in chunks] for name, chunks in evidence.outputs.items()}
                for module in self._modules(stream, block, evidence, text, measures, candidates_by):
                    _evaluate(found, module, measures)
                    if keep_candidates:
                        found.candidates[module.spec.name] = [on_host(q) for q in module.candidates]
            found.outputs = {name: [copy.result() for copy in chunks] for name, chunks in outputs.items()}
        if ATTENTION in weightings:
            for block, evidence in zip(blocks, self.walk_back(weightings=(ATTENTION,), at=at), strict=True):
                found.token_weights[ATTENTION][block] = evidence.weights[ATTENTION]
        return found

    def evidence(
        self,
        asked: Asked,
        *,
        at: Codes | None = None,
        for_activations: bool = False,
        stream: BlockStream | None = None,
    ) -> Iterator[BlockEvidence]:
        """One walk back; ``for_activations``: also for what carries its evidence over to a folded model; ``stream``:
        the model as it is opened already, whose block is in memory while its evidence is looked at."""
        return self.walk_back(
            weightings=tuple(sorted(asked.weightings)),
            hessians_by=asked.hessians_by,
            extra_passes=asked.passes,
            with_outputs=asked.with_outputs,
            at=at,
            for_activations=for_activations,
            stream=stream,
        )

    def walk_back(
        self,
        *,
        weightings: Sequence[str],
        hessians_by: Collection[str] = (),
        extra_passes: frozenset[Pass] = frozenset(),
        text_labels: bool = False,
        with_outputs: bool = False,
        at: Codes | None = None,
        for_activations: bool = False,
        stream: BlockStream | None = None,
    ) -> Iterator[BlockEvidence]:
        """Evidence of the blocks, last block first; with ``at``, of the model with these codes. Attention weights need
        a stream of their own."""
        terms = self.terms
        if stream is None:
            stream = self.stream("eager" if ATTENTION in weightings else None)
        changed = None if at is None else DenseCodes(stream, at)
        with KeptInputs(memory_bytes=KEPT_BYTES) as kept:
            sweep = GatherSweep(
                stream,
                [Shard(index=0, first_window=0, tokens=self.tokens)],
                num_shards=1,
                relevance=Relevance.NONE,
                floor=terms.floor,
                power=terms.power,
                seed=terms.seed,
                micro_batch=terms.micro_batch,
                kept=kept,
                weightings=weightings,
                hessians_by=hessians_by,
                extra_passes=extra_passes,
                text_labels=text_labels,
                outputs_by=split(len(self.tokens), terms.shards) if with_outputs else (),
                for_activations=for_activations,
            )
            sweep.embed()
            for block, module in stream.stream(range(stream.num_blocks), changed):
                sweep.forward(block, module)
            sweep.seed_gradients()
            for block, module in stream.stream(range(stream.num_blocks - 1, -1, -1), changed):
                yield sweep.gather(block, module, rounded=self._rounded if text_labels else None)

    def _rounded(self, spec: LinearSpec, W: Tensor) -> list[QuantizedWeight]:
        return [round_to_nearest(W, choice, grid=self.terms.grid, name=spec.name) for choice in self.fitting(spec)]

    def fitting(self, spec: LinearSpec) -> list[Choice]:
        """Choices whose groups fill the layer's rows."""
        return [choice for choice in self.terms.choices if choice.fits(spec.d_in)]

    def _modules(
        self,
        stream: BlockStream,
        block: int,
        evidence: BlockEvidence,
        text: Mapping[str, ModuleSums],
        measures: Mapping[str, Measure],
        candidates_by: str,
    ) -> list[ModuleEvidence]:
        curvature = means(evidence)
        with_rounded = any(measure.rounded for measure in measures.values())
        found = []
        for site, specs in stream.sites(block).items():
            hessians = {name: normalized(sums[site], name=specs[0].name) for name, sums in evidence.hessians.items()}
            factor = factorize(hessians[candidates_by], damping=self.terms.damping, name=specs[0].name)
            layers = ((spec.name, stream.weight(spec)) for spec in specs)
            quantized = quantize_side_by_side(layers, factor, self.fitting(specs[0]), grid=self.terms.grid)
            for spec, (W, candidates) in zip(specs, quantized, strict=True):
                sums, own = evidence.modules[spec.name], text.get(spec.name)
                found.append(
                    ModuleEvidence(
                        spec=spec,
                        W=W,
                        candidates=candidates,
                        rounded=self._rounded(spec, W) if with_rounded else (),
                        factor=factor,
                        grid=self.terms.grid,
                        hessians=hessians,
                        curvature=curvature[spec.name],
                        trace=float(sums.trace) / evidence.num_tokens,
                        bounded_trace=float(sums.share * sums.trace) / evidence.num_tokens,
                        relevance=float(sums.relevance) / evidence.num_tokens,
                        gradient_change=None if own is None else own.gradient_change,
                        output_error=None
                        if own is None or own.output_error is None
                        else (own.output_error / evidence.num_tokens).tolist(),
                        block_cosine=evidence.cosine,
                    )
                )
        return found

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe that this model or these windows do not allow, before any work.

        Raises:
            CalibrationError: something is to be tuned and no windows are held out to choose by.
            QuantizationError: gains are to be tuned in a model that has biases too, which cannot be evaluated.
        """
        if recipe.tuning == "none":
            return
        if self.terms.trellis:
            raise QuantizationError("scales and codes of a trellis are not tuned; compare with uniform codes")
        if self.held_out is None or not len(self.held_out):
            raise CalibrationError("tuning is chosen on held-out windows of the calibration text, and there are none")
        stream = self.stream()
        biases = [name for name, _ in stream.model.named_parameters() if name.endswith("bias")]
        if biases and Trained.VECTORS in TUNINGS[recipe.tuning]:
            raise QuantizationError(
                f"{biases[0]}: tuning of gains also tunes biases, which cannot be evaluated; compare tuned:scales"
            )

    def quantized(self, choices: Mapping[str, Choice | None], recipe: Recipe, gathered: Gathered) -> Quantized:
        """Codes by the recipe, tuned where it says so (``check`` has been asked). Tuning holds the whole model."""
        codes = self.codes(choices, recipe, gathered)
        if recipe.tuning == "none":
            return Quantized(codes=codes, vectors={})
        assert self.held_out is not None
        options = TuneOptions(trained=TUNINGS[recipe.tuning], seed=self.terms.seed)
        with KeptInputs(memory_bytes=KEPT_BYTES) as kept:
            tuned = tune(self.stream(), self.tokens, self.held_out, codes, options, kept=kept, resident=True)
        return Quantized(codes=dict(tuned.weights), vectors=dict(tuned.vectors))

    @torch.no_grad()
    def codes(
        self,
        choices: Mapping[str, Choice | None],
        recipe: Recipe,
        gathered: Gathered,
        activations: QuantizedActivations | None = None,
        rebuild: Rebuild | None = None,
    ) -> Codes:
        """Codes of every module by the recipe, sequentially: each site behind the quantized sites before it, unless
        they are stitched, and behind quantized activations where there are any; each block behind rebuilt ones, where
        they are rebuilt."""
        terms, stream = self.terms, self.stream()
        shards = {i: self.tokens[r.start : r.stop] for i, r in enumerate(split(len(self.tokens), terms.shards))}
        sweep = RefineSweep(
            stream,
            shards,
            num_shards=terms.shards,
            micro_batch=terms.micro_batch,
            with_shift=recipe.correction > 0,
            activations=activations,
        )
        sweep.embed()
        weights = None if recipe.weighting == "none" else gathered.token_weights[recipe.weighting]
        found: Codes = {}
        for block, module in stream.stream(range(stream.num_blocks)):
            before: dict[str, Tensor] = {}
            for site, specs in stream.sites(block).items():
                s = None if weights is None else _by_shard(weights[block][site], shards)
                products = root(sweep.products(block, module, specs, s, before), terms.shards, merge_products)
                for spec in specs:
                    choice = choices[spec.name]
                    if choice is not None:
                        outputs = gathered.outputs[spec.name] if recipe.row_blocks > 1 else None
                        weight = self._quantize(stream.weight(spec), products, choice, recipe, spec.name, outputs)
                        if recipe.rounding is not Rounding.STITCHED:
                            before[spec.name] = weight.dequantize(stream.dtype)
                        found[spec.name] = on_host(weight)
            if rebuild is not None:
                rebuilt = rebuild(block, module, {name: found[name] for name in before})
                found |= rebuilt
                before = {name: weight.dequantize(stream.dtype) for name, weight in rebuilt.items()}
                sweep.forget()
            sweep.advance(block, module, before)
        return found

    def _quantize(
        self,
        W: Tensor,
        products: SiteProducts,
        choice: Choice,
        recipe: Recipe,
        name: str,
        outputs: Outputs | None,
    ) -> QuantizedWeight:
        terms = self.terms
        if recipe.rounding is Rounding.NEAREST:
            H = normalized(products.hessian, name=name)
            return round_to_nearest(W, choice, importance=H.diagonal(), grid=terms.grid, name=name)
        if recipe.rounding is Rounding.GPTQ_IN_ORDER:
            H = normalized(products.hessian, name=name)
            factor = factorize(H, damping=terms.damping, act_order=False, name=name)
            return gptq(W, factor, [choice], H=H, grid=terms.grid, name=name)[0]  # R_kk^2 serves activation order
        return quantize_refined(
            W,
            products,
            choice,
            strength=recipe.correction,
            damping=terms.damping,
            correction_damping=recipe.correction_damping,
            polish_rounds=recipe.polish_rounds,
            outputs=outputs,
            row_blocks=recipe.row_blocks,
            grid=terms.grid,
            name=name,
        ).weight

    def scores(
        self, windows: Int[Tensor, "windows length"], quantized: Quantized, *, original: Workbench
    ) -> dict[str, list[WindowScore]]:
        """Scores of the original ("reference") and of this model with these codes ("variant"), a window each."""
        stream = self.stream()
        dense = dense_weights(stream, {}, quantized.vectors)

        def weights(block: int) -> dict[str, Tensor]:
            specs = [spec for spec in stream.block_specs(block) if spec.name in quantized.codes]
            return dense[block] | {spec.name: quantized.codes[spec.name].dequantize(stream.dtype) for spec in specs}

        if original is self:
            return score_windows(stream, windows, {VARIANT: weights})
        return score_windows(original.stream(), windows, {VARIANT: weights}, other=stream)


def _leaving(G: Tensor, copies: HostCopies) -> Future[Tensor]:
    """On its way to host memory, beside what a GPU computes next; of a CPU it is there."""
    if G.device.type != "cpu":
        return copies.start(G)
    there: Future[Tensor] = Future()
    there.set_result(G)
    return there


def _evaluate(found: Gathered, module: ModuleEvidence, measures: Mapping[str, Measure]) -> None:
    spec = module.spec
    for name, measure in measures.items():
        if measure.score is not None:
            found.scores.setdefault(name, {})[spec.name] = measure.score(module)
        if measure.costs is not None:
            found.costs.setdefault(name, []).extend(
                CostRow(
                    module=spec,
                    choice=candidate.choice,
                    storage_bits=storage_bits(spec.d_out, spec.d_in, candidate.choice),
                    cost_nats=cost,
                )
                for candidate, cost in zip(module.candidates, measure.costs(module), strict=True)
            )


def _by_shard(s: Tensor, shards: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Token weights of all windows, cut as the windows are."""
    windows = sum(len(shard) for shard in shards.values())
    sizes = [len(shards[index]) * (len(s) // windows) for index in sorted(shards)]
    return dict(zip(sorted(shards), torch.split(s, sizes), strict=True))
