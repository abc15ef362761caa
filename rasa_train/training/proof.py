"""The proof at the start of a run that the model learns, and that it is trained on what it is meant to learn.

Before the first step, with the run's own model, loss and data: no token sees the tokens that it is to predict, and
sequences that share a row are computed as they are apart. After the first step: a gradient has reached every adapted
linear and has changed its adapter, the loss is not that of guessing, and the end of a text is trained. What makes
training worthless ends the run; everything else is said once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapters.inserted import Inserted
from ..data.cache import TokenDataset
from ..data.encode import IGNORE, Example
from ..data.tokenise import Stats
from ..errors import UserError, some
from ..models import padding_free
from ..models.families import end_tokens
from ..models.suitable import not_causal
from ..objectives.contract import Batch
from .micro_batches import Step, on_device
from .step import nothing_trains
from .trainable_model import TrainableModel

STEPS = 3
"""Number of steps after which a linear without a gradient is reported. In the first step some methods give a part of
their tensors no gradient: the factor A of a LoRA whose B is zero, for example."""
PROBE_TOKENS = 16
"""Length of the sequences that are made up to look for what a token sees."""
ROWS = 1_000
"""Number of examples that are looked at for the end of a text."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-3, torch.float16: 5e-3}
"""Relative difference between two ways to compute a loss that rounding explains, by the dtype of the base."""
GUESSING = 0.9
"""Share of the loss of guessing that a first loss should be below."""


class Proof:
    """The checks of one run. All workers call the same methods, and come to the same result."""

    def __init__(self, model: TrainableModel, train: TokenDataset, stats: Stats, say: Callable[[str], None]) -> None:
        self.model, self.train, self.stats, self.say = model, train, stats, say
        self.pending = True
        """Whether there is something left to prove."""
        self._steps = 0
        self._first_loss = math.nan
        self._reached: set[str] = set()
        self._before: dict[str, int] = {}

    # -- before the first step ---------------------------------------------------------------------------

    def begin(self, work: Step) -> None:
        """Check the model with this worker's part of the first step, which leaves no trace in the model, and remember
        the values of the trained tensors. Later calls do nothing.

        Raises:
            UserError: tokens see what they are to predict, or sequences of one row are not computed as they are apart.
        """
        if not self._before and self.model.objective.causal:
            self.model.module.eval()
            with torch.compiler.set_stance("force_eager"), torch.random.fork_rng(_devices(self.model)):
                self._check_causal()
                if self.model.recipe.training.flat:
                    self._check_packing(work)
        self._before = self._before or self._values()

    def _check_causal(self) -> None:
        ids = np.resize(self.train[0].input_ids, PROBE_TOKENS)
        middle = PROBE_TOKENS // 2
        batch = self._tensors([Example(ids, _only(ids, middle))])
        if self._depends(batch, slice(middle, PROBE_TOKENS)):
            raise not_causal(self.model.recipe.model.name)

    def _check_packing(self, work: Step) -> None:
        ids = np.resize(self.train[0].input_ids, PROBE_TOKENS)
        nothing = np.full_like(ids, IGNORE)
        batch = self._tensors([Example(ids, nothing), Example(ids[::-1].copy(), _only(ids[::-1], PROBE_TOKENS - 1))])
        if self._depends(batch, slice(0, PROBE_TOKENS)):
            raise self._cannot_pack("a token sees the tokens of other sequences in its row")
        lengths = self.train.lengths
        # The longest shows whether a window is kept, which no shorter one fills.
        sets = [[self.train[int(lengths.argmax())], self.train[int(lengths.argmin())]]]
        if not self.model.engine.sharded and len(work.mine[0]):  # other workers have another number of sequences
            sets.append([self.train[int(i)] for i in work.mine[0]])
        tolerance = TOLERANCE[self.model.torch_dtype]
        for examples in sets:
            together = self._loss(self._tensors(examples))
            with padding_free.padded(self.model.module):
                apart = sum(self._loss(self._tensors([example], flat=False)) for example in examples)
            if not abs(together - apart) <= tolerance * max(abs(apart), 1.0):
                targets = max(sum(int((e.labels[1:] != IGNORE).sum()) for e in examples), 1)
                raise self._cannot_pack(
                    f"the loss of {len(examples)} sequences is {together / targets:.4f} in one row and "
                    f"{apart / targets:.4f} one by one"
                )

    def _cannot_pack(self, why: str) -> UserError:
        return UserError(
            f"training.batching: {self.model.recipe.model.name} cannot be trained without padding: {why}. Set "
            "training.batching to length-grouped or shuffled, and training.padding_free to false",
            key="training.batching",
        )

    def _tensors(self, examples: Sequence[Example], *, flat: bool | None = None) -> Batch:
        flat = self.model.recipe.training.flat if flat is None else flat
        batch = self.model.objective.tensors(examples, flat=flat)
        return on_device(batch, self.model.engine.accelerator.device)

    @torch.no_grad()
    def _loss(self, batch: Batch) -> float:
        loss = float(self.model.loss(batch))
        self.model.engine.release()
        return loss

    def _depends(self, batch: Batch, where: slice) -> bool:
        """Whether the loss depends on the tokens ``where`` of the first row: the gradient of their embeddings is then
        not zero. It is exactly zero if attention leaves them out, whatever the dtype."""
        if self.model.engine.sharded:  # a gradient would need the strategy's own backward pass
            return self._changes(batch, where)
        found: list[Tensor] = []

        def leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            found.append(output.detach().requires_grad_())
            return found[-1].clone()  # some models write into the result

        embedding = self.model.module.get_input_embeddings()  # type: ignore[operator]
        hook = embedding.register_forward_hook(leaf)
        try:
            with torch.enable_grad():
                loss = self.model.loss(batch)
        finally:
            hook.remove()
        if not found or not loss.requires_grad:
            return False
        (gradient,) = torch.autograd.grad(loss, found[:1], allow_unused=True)
        if gradient is None or not bool(gradient.isfinite().all()):
            return False
        return bool(gradient.flatten(0, -2)[where].any())

    def _changes(self, batch: Batch, where: slice) -> bool:
        """Whether the loss is another one if the tokens ``where`` are others, beyond rounding."""
        ids = batch["input_ids"]
        assert isinstance(ids, Tensor)
        others = ids.clone()
        others[0, where] = ids[0, where].flip(0).roll(1)
        before, after = self._loss(batch), self._loss({**batch, "input_ids": others})
        return abs(after - before) > TOLERANCE[self.model.torch_dtype] * max(abs(before), 1.0)

    # -- after the first steps ---------------------------------------------------------------------------

    def after(self, loss: float, *, moves: bool) -> None:
        """Look at what a step that was not skipped has changed, if it ``moves`` anything: its rate is not zero.

        Raises:
            UserError: no trained tensor has had a gradient.
        """
        if math.isnan(self._first_loss):
            self._first_loss = loss
        if not moves:
            return
        self._steps += 1
        units = self._units()
        after = self._values()
        moved = {name for name in after if after[name] != self._before[name]}
        self._before = after
        reached = self._with_gradient() & moved
        self._reached |= {unit for unit, names in units.items() if not reached.isdisjoint(names)}
        if self._steps == 1 and not reached:
            raise nothing_trains(len(units))
        if len(self._reached) == len(units) or self._steps == STEPS:
            self.finish()

    def finish(self) -> None:
        """Say what was found, if that has not been said yet: after the first steps, or at the end of a shorter run."""
        if not self.pending or not self._steps:
            return
        self.pending = False
        units = list(self._units())
        dead = [unit for unit in units if unit not in self._reached]
        # After one step nothing is known of methods whose first gradient reaches no tensor of a linear's own.
        if dead and (self._steps > 1 or (self._reached and self.model.adapters)):
            self.say(
                f"no gradient reaches {len(dead)} of {len(units)} {self._kind}: {some(dead)}. They stay as they "
                f"are; leave them out with adapter.exclude: [{', '.join(self._names(dead))}]"
            )
        self.say(f"proof: {'; '.join(self._facts(len(units) - len(dead), len(units)))}")

    def _names(self, dead: Sequence[str]) -> list[str]:
        """Return names for ``adapter.exclude`` that match these linears alone: the kind, if all of a kind are here."""
        kinds = {path: adapter.site.kind for path, adapter in self.model.adapters.items()}
        alive = {kind for path, kind in kinds.items() if path not in dead}
        return sorted({path if kinds.get(path, path) in alive else kinds.get(path, path) for path in dead})

    def _facts(self, reached: int, units: int) -> Iterable[str]:
        yield f"{reached} of {units} {self._kind} have a gradient and have moved"
        model, guess = self.model, math.log(self.model.vocabulary)
        if not model.objective.causal:
            yield f"the first loss is {self._first_loss:.2f}"
        elif self._first_loss < GUESSING * guess:
            yield f"the first loss is {self._first_loss:.2f} ({guess:.2f} would be guessing)"
        else:
            yield (
                f"the first loss is {self._first_loss:.2f}, no better than guessing ({guess:.2f}): does the tokenizer "
                "belong to the model, and has it been trained?"
            )
        if model.objective.causal and (ends := end_tokens(model.module)):
            looked = range(0, len(self.train), max(1, len(self.train) // ROWS))
            trained = sum(bool(np.isin(self.train[i].labels, ends).any()) for i in looked)
            if trained:
                yield f"the end of a text is trained in {trained:,} of {len(looked):,} rows"
            else:
                ids = ", ".join(map(str, ends))
                yield (
                    f"the end of a text (token {ids}) is trained in none of {len(looked):,} rows, so the model may not "
                    "learn to stop"
                )
        if self.stats.truncated:
            yield f"{self.stats.truncated / self.stats.rows:.1%} of the rows were cut at data.max_length"

    @property
    def _kind(self) -> str:
        return "adapted linears" if self.model.adapters else "trained modules"

    def _units(self) -> Mapping[str, list[str]]:
        """Return the names of the trained tensors of each adapted linear; without adapted linears, of each module that
        was put into the base, or is trained in it."""
        if self.model.adapters:
            named = {path: dict(adapter.named_parameters()) for path, adapter in self.model.adapters.items()}
            own = {path: [f"{path}.{name}" for name, p in found.items()] for path, found in named.items()}
            return {path: names for path, names in own.items() if any(name in self.model.parameters for name in names)}
        modules = self.model.module.named_modules()  # names of tensors leave the last part of an inserted module out
        inserted = [path.rpartition(".")[0] for path, module in modules if isinstance(module, Inserted)]
        units: dict[str, list[str]] = {}
        for name in self.model.parameters:
            around = next((path for path in inserted if name.startswith(f"{path}.")), name.rpartition(".")[0])
            units.setdefault(around, []).append(name)
        return units

    @torch.no_grad()
    def _values(self) -> dict[str, int]:
        """Return a checksum of the bits of each trained tensor."""
        sums = []
        for parameter in self.model.parameters.values():
            whole = self.model.engine.whole(parameter).detach().contiguous()
            sums.append(whole.view(-1).view(torch.int32).sum(dtype=torch.int64).cpu())
        return dict(zip(self.model.parameters, torch.stack(sums).tolist(), strict=True))

    @torch.no_grad()
    def _with_gradient(self) -> set[str]:
        """Return the names of the trained tensors that have had a gradient: the optimizer's mean of it is not zero."""
        engine, names = self.model.engine, set()
        for name, parameter in self.model.parameters.items():
            mean = engine.optimizer_state(parameter).get("exp_avg")
            if mean is not None and bool(mean.any()):
                names.add(name)
        return names


def _only(ids: np.ndarray, position: int) -> np.ndarray:
    """Return labels that supervise the token at one position."""
    labels = np.full_like(ids, IGNORE)
    labels[position] = ids[position]
    return labels


def _devices(model: TrainableModel) -> list[torch.device]:
    device = model.engine.accelerator.device
    return [device] if device.type == "cuda" else []
