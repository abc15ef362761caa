"""rasa-eval of adapters that cannot be merged: they answer, and score choices, in place inside the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from rasa_train.adapters.inject import adapt
from rasa_train.adapters.registry import METHODS
from rasa_train.adapters.saved import write_adapter
from rasa_train.adapters.state import saved_tensors, trainable
from rasa_train.errors import UserError
from rasa_train.evaluate.load import Plan, find_subjects, load_lm
from rasa_train.merging.peft_format import export_peft
from rasa_train.models.config import ModelConfig
from rasa_train.models.load import load_model
from tests.conftest import Cli

DEMO = str(Path(__file__).parents[2] / "rasa_train/demo/model")
METHOD_FIELDS: dict[str, dict[str, Any]] = {
    "bottleneck": {"method": "bottleneck", "size": 4},
    "prefix": {"method": "peft", "config": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}},
    "prompt": {"method": "peft", "config": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}},
}


@torch.no_grad()
@pytest.mark.parametrize("name", METHOD_FIELDS)
def test_answers_and_likelihoods_are_the_adapted_models(name: str, tmp_path: Path) -> None:
    method = METHODS[METHOD_FIELDS[name]["method"]].model_validate(METHOD_FIELDS[name])
    model, _ = adapt(load_model(ModelConfig(name="demo", dtype="float32")), method)
    torch.manual_seed(1)
    for parameter in trainable(model).values():
        parameter += 0.3 * torch.randn_like(parameter)
    model.eval()
    path = tmp_path / "adapter"
    path.mkdir()
    write_adapter(path, method, saved_tensors(model), base_model=DEMO, base_revision=None)
    places = [path]
    if name != "bottleneck":
        export_peft(path, tmp_path / "peft")
        places.append(tmp_path / "peft")
    for place in places:
        (subject,) = find_subjects(str(place), all_checkpoints=False, output=None)
        lm = load_lm(Plan(subject, dtype="float32"))
        text, choice = "Anna has 3 apples.", " She eats 2"
        ids = lm.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        tokens = ids
        while tokens.shape[1] < ids.shape[1] + 5 and int(tokens[0, -1]) != lm.tokenizer.eos_token_id:
            tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
        request = {"until": ["@@@"], "max_gen_toks": 5, "do_sample": False}
        long = Instance("generate_until", {}, (f"{text} {text}", request), 0)
        answers = lm.generate_until([Instance("generate_until", {}, (text, request), 0), long], disable_tqdm=True)
        assert answers[0] == lm.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
        ((score, _),) = lm.loglikelihood([Instance("loglikelihood", {}, (text, choice), 0)], disable_tqdm=True)
        whole = lm.tokenizer(text + choice, return_tensors="pt", add_special_tokens=False).input_ids
        scores = model(input_ids=whole[:, :-1]).logits.log_softmax(-1).gather(-1, whole[:, 1:, None])[0, :, 0]
        assert score == pytest.approx(float(scores[ids.shape[1] - 1 :].sum()), abs=1e-3)
    with pytest.raises(UserError, match="this adapter cannot be merged: use --backend hf"):
        load_lm(Plan(subject, backend="vllm"))


RECIPE = """\
model: {{name: demo, dtype: float32}}
adapter: {adapter}
data: {{dataset: demo, max_length: 192}}
training: {{max_steps: 4, batch_size: 4, checkpoint_every: 2, optimizer: {{name: adamw, lr: 1e-2}}}}
output_dir: run
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bottleneck", "prefix"])
def test_a_run_is_trained_resumed_and_evaluated(name: str, cli: Cli, tmp_path: Path) -> None:
    Path("r.yaml").write_text(RECIPE.format(adapter=json.dumps(METHOD_FIELDS[name])))
    checked = cli("train", "check", "r.yaml", "--nproc", 1)
    assert "the adapter cannot be merged (" in checked.stdout and "rasa-eval evaluates it inside" in checked.stdout
    half = cli("train", "r.yaml", "training.max_steps=2", "training.schedule.name=constant", "--nproc", 1, check=True)
    assert "note: this adapter cannot be merged (" in half.stderr
    assert "evaluate it inside the base with rasa-eval run" in half.stdout
    done = cli("eval", "run", "--suite", "gsm8k", "--data", "demo", "--limit", 1, "--json", check=True)
    assert json.loads(done.stdout)["results"][0]["questions"] == 1
    refused = cli("merge", "run", "--output", "merged")
    assert refused.returncode == 2 and "cannot be merged" in refused.stderr and not Path("merged").exists()
