"""What happens to a tiny random model of a family that is trained, packed, merged and exported with the real commands.

Each of the four gets an ``Outcome``. The oracles are transformers, which runs the same sequences one by one without
padding, and PEFT, which reads the exported LoRA.
"""

from __future__ import annotations

import json
import re
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from rasa_train import api
from rasa_train.data.batching import plan_epoch
from rasa_train.data.demo_problems import held_out
from rasa_train.data.prepare import PreparedData, prepare
from rasa_train.errors import UserError
from rasa_train.models.load import load_model, load_tokenizer
from rasa_train.recipe.load import load_recipe
from rasa_train.recipe.schema import Recipe
from tests.conftest import run_command

from .specs import FAMILIES, Spec

DEMO = Path(api.__file__).parent / "demo" / "model"
ROWS, BATCH, PROBES = 24, 8, 4
LOSS, LOGITS, EFFECT = 1e-5, 1e-4, 5e-2
"""The largest differences of a loss and of a logit that count as equal, and the least effect of an adapter that has
learned anything."""
TOWER = re.compile(r"vision|visual|image|audio|speech|embed_tokens_extend")
ROUTER = re.compile(r"(^|\.)(gate|shared_expert_gate|\w*router\w*)(\.|$)")

Kind = Literal["ok", "refused", "SILENT", "TRACEBACK", "-"]


class Outcome(NamedTuple):
    kind: Kind
    text: str = ""
    """The difference that was measured, the message of the refusal, or what went wrong."""

    @property
    def at_fault(self) -> bool:
        return self.kind in ("SILENT", "TRACEBACK")


NOT_REACHED = Outcome("-")


@dataclass
class Record:
    family: str
    model_class: str
    """The class that the base was saved from."""
    train: Outcome = NOT_REACHED
    packed: Outcome = NOT_REACHED
    merge: Outcome = NOT_REACHED
    export: Outcome = NOT_REACHED
    remarks: list[str] = field(default_factory=list)

    @property
    def outcomes(self) -> dict[str, Outcome]:
        return {name: getattr(self, name) for name in ("train", "packed", "merge", "export")}

    @property
    def faults(self) -> list[str]:
        return [f"{name}: {o.kind} {o.text}" for name, o in self.outcomes.items() if o.at_fault]


def build(spec: Spec, directory: Path) -> str:
    """Save a random fp32 model of the configuration, with the demo's tokenizer. Returns the name of its class."""
    config = AutoConfig.for_model(spec.model_type, **spec.values)
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, spec.auto).from_config(config, dtype=torch.float32)
    with torch.no_grad():  # as they are made, many hardly attend, and biases are zero
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(directory)
    for file in DEMO.glob("tokenizer*"):
        shutil.copyfile(file, directory / file.name)
    return type(model).__name__


def examine(name: str, directory: Path) -> Record:
    """Take the family through training, packing, merging and exporting, in an empty directory."""
    case = Case(FAMILIES[name], directory)
    record = Record(name, case.class_name, remarks=case.remarks)
    record.train = case.outcome(case.train)
    if record.train.kind in ("ok", "SILENT"):
        record.packed = case.outcome(case.packed)
        record.merge = case.outcome(case.merge)
        record.export = case.outcome(case.export)
    return record


class Refused(Exception):
    """A command ended with the exit code of a user's error."""


class Case:
    """One family in its directory: the base, runs, and what is made of them."""

    def __init__(self, spec: Spec, directory: Path) -> None:
        self.directory, self.class_name = directory, build(spec, directory / "base")
        self.remarks: list[str] = []
        rows = held_out(ROWS)
        (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def outcome(self, work: Callable[[], Outcome]) -> Outcome:
        try:
            return work()
        except (UserError, Refused) as refusal:
            return Outcome("refused", self._line(str(refusal)))
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).parent.name}/{Path(last.filename).name}"
            return Outcome("TRACEBACK", self._line(f"{type(error).__name__} in {where}: {error}"))

    def _line(self, message: str) -> str:
        """Return a message as one line, without directories of this run and the place in the recipe."""
        text = " ".join(message.replace(f"{self.directory}/", "").split()).rpartition("error: ")[2]
        return re.sub(r" at (command line|\S+\.yaml:\d+): .*", "", text).replace("`", "").replace("|", "/")

    # -- the four commands ---------------------------------------------------------------------------------------

    def train(self) -> Outcome:
        said = self.fit("length-grouped", 2)
        return self._trained("length-grouped", [*self.base_faults(), *self._site_faults(said)])

    def packed(self) -> Outcome:
        self.fit("packed", 1)
        return self._trained("packed", [])

    def merge(self) -> Outcome:
        self._command("merge", self._run("length-grouped"), "--output", self.directory / "merged")
        merged = self._logits(self._own_class.from_pretrained(self.directory / "merged", dtype=torch.float32))
        return self._as_adapted(merged)

    def export(self) -> Outcome:
        lora = self.directory / "lora"
        self._command("merge", self._run("length-grouped"), "--format", "lora", "--output", lora)
        classes = list(dict.fromkeys([self._own_class, self._trained_class]))
        found = [self.outcome(lambda cls=cls: self._as_adapted(self._in_peft(cls, lora))) for cls in classes]
        if found[0].kind != "ok" and found[-1].kind == "ok":
            self.remarks.append(f"the LoRA is for {classes[-1].__name__}")
            return found[-1]
        return found[0]

    def fit(self, batching: str, steps: int, *overrides: str) -> str:
        """Train. Returns what was said; raises ``Refused``."""
        return self._command("train", *self._arguments(batching, steps), *overrides)

    def sites(self) -> dict[str, Tensor]:
        """Return the factor B of each adapted linear, by its path: zero until a gradient has reached it."""
        tensors = load_file(self._run("length-grouped") / "adapter" / "adapter.safetensors")
        found = {name.removesuffix(".B"): tensor for name, tensor in tensors.items() if name.endswith(".B")}
        return {path: tensor for path, tensor in found.items() if not path.startswith("pools.")}

    # -- what they are made of -----------------------------------------------------------------------------------

    def _command(self, *arguments: object) -> str:
        """Run a command of the package. Returns what it said; raises ``Refused`` if it refused."""
        done = run_command(*arguments)  # type: ignore[arg-type]
        if done.returncode == 2:
            raise Refused(done.stderr)
        assert done.returncode == 0, done.stderr
        return done.stderr + done.stdout

    def _run(self, batching: str) -> Path:
        return self.directory / batching

    def _arguments(self, batching: str, steps: int) -> list[str]:
        values = {
            "model.name": self.directory / "base",
            "adapter": "{method: rasa, r: 4, k: 1, alpha: 8}",
            "data.dataset": self.directory / "rows.jsonl",
            "data.template": "plain",
            "data.supervise": "all",
            "data.cache_dir": self.directory.parent / "tokens",
            "training.optimizer": "{name: lionw, lr: 0.02}",
            "training.schedule": "{name: constant}",
            "training.batch_size": BATCH,
            "training.batching": batching,
            "training.max_steps": steps,
            "output_dir": self._run(batching),
        }
        return ["demo", *(f"{key}={value}" for key, value in values.items())]

    @cached_property
    def _recipe(self) -> Recipe:
        recipe, *overrides = self._arguments("length-grouped", 2)
        return load_recipe(recipe, overrides).recipe

    @cached_property
    def _data(self) -> PreparedData:
        return prepare(self._recipe.data, load_tokenizer(self._recipe.model))

    @cached_property
    def _own_class(self) -> Any:
        """The class of transformers that the base names as its own."""
        return getattr(transformers, self.class_name)

    @cached_property
    def _trained_class(self) -> Any:
        return type(load_model(self._recipe.model))

    def _logits(self, model: nn.Module) -> Tensor:
        """Return the logits of the first rows, one after the other: (tokens, vocabulary)."""
        model.eval()
        with torch.no_grad():
            return torch.cat([_logits(model, self._ids(index))[0] for index in range(PROBES)])

    def _ids(self, index: int) -> Tensor:
        return torch.as_tensor(self._data.train[index].input_ids, dtype=torch.long)[None]

    # -- what may be wrong ---------------------------------------------------------------------------------------

    def base_faults(self) -> list[str]:
        """Return what is wrong with the model that was trained: weights drawn at random, a look ahead."""
        faults = []
        loaded = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            loaded.append(load_model(self._recipe.model))
        one, two = (model.state_dict() for model in loaded)
        if drawn := [name for name, tensor in one.items() if not torch.equal(tensor, two[name])]:
            faults.append(f"trained on {len(drawn)} random tensors that are not in the files, such as {drawn[0]}")
        model, ids = loaded[0].eval(), self._ids(0)
        other = ids.clone()
        other[0, -1] += 7  # another token of the vocabulary: rows end in the end token, which is 1
        with torch.no_grad():
            ahead = (_logits(model, ids) - _logits(model, other))[0, :-1].abs().max()
        if ahead > LOSS:
            faults.append(f"trained as causal, but the last token moves earlier logits by {ahead:.0e}")
        return faults

    def _loss_above(self, batching: Any) -> float:
        """Return the loss of the first step less that of transformers."""
        training, lengths = self._recipe.training, self._data.train.lengths
        (first, *_) = plan_epoch(lengths, batching=batching, batch_size=BATCH, seed=self._recipe.seed, epoch=0)
        assert training.batch_size == len(first)
        sums = [self._reference(int(index)) for index in first]
        row = json.loads((self._run(batching) / "metrics.jsonl").read_text().splitlines()[0])
        return float(row["loss"]) - sum(loss for loss, _ in sums) / sum(number for _, number in sums)

    def _reference(self, index: int) -> tuple[float, int]:
        """Return the summed loss of a row under transformers' own model, and its number of targets."""
        example = self._data.train[index]
        labels = torch.as_tensor(example.labels, dtype=torch.long)[1:]
        with torch.no_grad():
            logits = _logits(self._own_model, self._ids(index))[0, :-1]
        loss = F.cross_entropy(logits.double(), labels, ignore_index=-100, reduction="sum")
        return float(loss), int((labels != -100).sum())

    @cached_property
    def _own_model(self) -> Any:
        return self._own_class.from_pretrained(self.directory / "base", dtype=torch.float32).eval()

    @cached_property
    def _speaks(self) -> bool:
        """Whether the base, under its own class, gives logits for every token."""
        ids = self._ids(0)
        with torch.no_grad():
            return _logits(self._own_model, ids).shape[:2] == ids.shape

    @cached_property
    def _random(self) -> bool:
        """Whether the model's own dropout or jitter makes its loss random in training."""
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            with torch.no_grad():
                found.append(_logits(self._own_model.train(), self._ids(0)))
        self._own_model.eval()
        return not torch.equal(*found)

    def _trained(self, batching: str, faults: list[str]) -> Outcome:
        """Return the outcome of a run whose other ``faults`` are known: its loss is compared here."""
        if not self._speaks:
            return Outcome("SILENT", "; ".join([*faults, f"trained as a language model, but it is {self.class_name}"]))
        if self._random:
            remark = "its own dropout is on, so losses are not compared"
            self.remarks += [remark] if remark not in self.remarks else []
        difference = 0.0 if self._random else self._loss_above(batching)
        if abs(difference) > LOSS:
            faults = [*faults, f"the loss differs by {difference:+.1e}"]
        if faults:
            return Outcome("SILENT", "; ".join(faults))
        return Outcome("ok", "" if self._random else f"{abs(difference):.0e}")

    def _site_faults(self, said: str) -> list[str]:
        """Return what is wrong with the choice of linears: dead ones that nothing ``said`` names, towers, routers."""
        sites = self.sites()
        tower = [path for path in sites if TOWER.search(path)]
        dead = [path for path, tensor in sites.items() if not tensor.any() and path not in tower]
        wrong = {
            "no gradient reaches": [path for path in dead if not re.search(rf"\b{_name(path)}\b", said)],
            "adapted in a tower:": tower,
            "routers are adapted:": [path for path in sites if ROUTER.search(path)],
        }
        return [f"{what} {_kinds(paths)}" for what, paths in wrong.items() if paths]

    @cached_property
    def _adapted(self) -> tuple[Tensor, Tensor]:
        """The logits of the base, and of the base with the adapter."""
        model = load_model(self._recipe.model)
        base = self._logits(model)
        return base, self._logits(api.load_adapter(model, self._run("length-grouped") / "adapter"))

    def _as_adapted(self, logits: Tensor) -> Outcome:
        base, adapted = self._adapted
        effect = (adapted - base).abs().max()
        if effect < EFFECT:
            return Outcome("SILENT", f"the adapter changes no logit by more than {effect:.0e}")
        if logits.shape != adapted.shape:
            return Outcome("SILENT", f"the outputs have the shape {list(logits.shape)}")
        difference = (logits - adapted).abs().max()
        if not difference <= LOGITS:
            return Outcome("SILENT", f"logits differ by {difference:.0e}, the adapter changes them by {effect:.0e}")
        return Outcome("ok", f"{difference:.0e}")

    def _in_peft(self, cls: Any, lora: Path) -> Tensor:
        model = cls.from_pretrained(self.directory / "base", dtype=torch.float32)
        return self._logits(PeftModel.from_pretrained(model, lora))


def _logits(model: Any, ids: Tensor) -> Tensor:
    """Return the logits of a model in its forward without a cache: (1, tokens, vocabulary)."""
    # PaliGemma sees its prompt in both directions: here no token is of a prompt.
    more = {"token_type_ids": torch.ones_like(ids)} if model.config.model_type == "paligemma" else {}
    logits: Tensor = model(input_ids=ids, use_cache=False, **more).logits
    return logits


def _name(path: str) -> str:
    """Return the last part of a path that is not a number."""
    return [part for part in path.split(".") if not part.isdigit()][-1]


def _kinds(paths: list[str]) -> str:
    """Return the kinds of the linears, without the numbers of layers."""
    kinds = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".N", path) for path in paths)
    return ", ".join(kinds)
