"""Faults of evaluations, checks and reports that were reported publicly elsewhere, and what happens here instead."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, get_cosine_schedule_with_warmup

from rasa_train.adapters.inject import attach
from rasa_train.adapters.state import trainable
from rasa_train.check.estimate import plan
from rasa_train.errors import UserError
from rasa_train.evaluate.answer_equality import equal
from rasa_train.evaluate.answers import given_answer
from rasa_train.evaluate.generate import Generation, SampleFile, generate
from rasa_train.evaluate.load import wrap
from rasa_train.evaluate.passk import mean_pass_at_k, pass_at_k
from rasa_train.evaluate.score import code_metrics, code_not_measured
from rasa_train.evaluate.suites import Suite, load_suite
from rasa_train.methods.full import Full
from rasa_train.models.config import ModelConfig
from rasa_train.models.load import load_model, load_tokenizer
from rasa_train.optim.schedule import ScheduleConfig, lr_factor
from rasa_train.recipe.load import load_recipe
from rasa_train.report.runs import lower_is_better
from tests.conftest import Cli


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path, token_rows: Path) -> Path:
    """A recipe on a copy of the tiny Llama, which a test may damage."""
    shutil.copytree(tiny_llama, tmp_path / "base")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {name: base, dtype: float32}\nadapter: {method: lora, r: 4}\n"
        f"data: {{dataset: {token_rows}}}\ntraining: {{max_steps: 1}}\noutput_dir: run\n"
    )
    return path


def test_pass_at_k_without_enough_samples() -> None:
    """openai/human-eval#35: with no correct sample among n < k, the estimator gave a pass@k of 1.

    Here: the estimate is not defined for k > n. It raises, and the mean over problems leaves such a k out.
    """
    with pytest.raises(ValueError, match="not defined for 2 samples"):
        pass_at_k(2, 0, 5)
    assert mean_pass_at_k([(2, 0), (20, 20)], ks=(1, 5)) == {"pass@1": 0.5}


def test_one_sample_of_each_problem_has_no_pass_at_10() -> None:
    """paiml/aprender#2118: problems were counted as samples, so that one greedy answer each gave a pass@10 of 97.7%.

    Here: samples are counted for each problem, and pass@10 is said not to be measured, with the reason.
    """
    rows = [{"task_id": f"HumanEval/{i}", "passed": i < 50} for i in range(164)]
    assert code_metrics(rows) == {"pass@1": pytest.approx(50 / 164)}
    assert code_not_measured(rows) == {
        "pass@10": "needs 10 samples of every problem; 164 of 164 have fewer, the fewest 1"
    }


def test_a_comma_after_the_number_is_not_the_answer() -> None:
    """stanford-crfm/helm#4337: a lone comma after the last number was extracted as the answer, and 72 counted as wrong.

    Here: only marked answers are extracted, and thousands separators belong to numbers alone.
    """
    assert given_answer("The total, altogether, is 72 clips.\n#### 72") == "72"
    assert given_answer("So, in total, that is it.\nThe answer is: 72") == "72"
    assert given_answer("The total is 72 clips, altogether.") is None


def test_thousands_separators_do_not_cut_a_number() -> None:
    r"""open-compass/opencompass#2647: \boxed{8,000} was read as 000, and \boxed{$9{,}500} as 500.

    Here: separators in figures and in LaTeX are removed, so both are equal to the plain number.
    """
    for text, gold in ((r"\boxed{8,000}", "8000"), (r"\boxed{\$9{,}500}", "9500"), ("The answer is: 10,000", "10000")):
        answer = given_answer(text)
        assert answer is not None and equal(gold, answer), text


def test_currency_and_a_full_stop_are_not_part_of_the_answer() -> None:
    """EleutherAI/lm-evaluation-harness#3214: $29.00. was compared with 29 as it stood, and counted as wrong.

    Here: signs of currency and the full stop of the sentence are removed before the comparison.
    """
    for text in ("The answer is: $29.", r"It is \boxed{\$29}.", "The answer is: 29 dollars."):
        answer = given_answer(text)
        assert answer is not None and equal("29", answer), text


@pytest.fixture(scope="module")
def asked() -> tuple[Any, Suite]:
    """The demo model with noise on its weights, so that it does not stop at once, and questions of unequal length."""
    config = ModelConfig(name="demo", dtype="float32")
    model = load_model(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    suite = load_suite("gsm8k", "demo")
    suite.task.config.generation_kwargs["max_gen_toks"] = 16
    return wrap(model, load_tokenizer(config)), suite


def answers(asked: tuple[Any, Suite], tokens: int) -> list[str]:
    lm, suite = asked
    questions = sorted(suite.questions[:8], key=lambda question: len(question.prompt))[::3]
    return [texts[0] for texts in generate(lm, suite, questions, SampleFile(None, {}), Generation(tokens))]


def test_generation_stops_at_every_end_token_of_the_model(asked: tuple[Any, Suite]) -> None:
    """huggingface/lighteval#196: answers went on after <|eot_id|>, because only the tokenizer's eos ended them.

    Here: every token that the model's generation config lists as an end ends an answer, in a batch as well.
    """
    lm, _ = asked
    free, settings = answers(asked, 1_000_000), lm.model.generation_config
    end = lm.tokenizer.encode(free[0], add_special_tokens=False)[3]
    before, settings.eos_token_id = settings.eos_token_id, [lm.tokenizer.eos_token_id, end]
    try:
        stopped = answers(asked, 1_000_000)
    finally:
        settings.eos_token_id = before
    for whole, cut in zip(free, stopped, strict=True):
        ids = lm.tokenizer.encode(cut, add_special_tokens=False)
        assert whole.startswith(cut) and end not in ids[:-1]
    assert len(stopped[0]) < len(free[0])


@pytest.mark.parametrize(("name", "lower"), [("eval_my-set_loss", True), ("validation_loss", True), ("pass@1", False)])
def test_the_best_of_a_loss_is_the_lowest(name: str, lower: bool) -> None:
    """huggingface/transformers#31142: for a loss named after its data set the highest counted as the best checkpoint.

    Here: a name that contains the word loss, wherever, is of a score of which the lowest is the best.
    """
    assert lower_is_better(name) == lower


def test_the_learning_rate_after_a_restart_is_that_of_the_step() -> None:
    """aqlaboratory/openfold#181: after a restart from a checkpoint the learning rate began with the warm-up again.

    Here: the rate is a function of the step alone. From step 37 on it is that of transformers' schedule.
    """
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=10, num_training_steps=100)
    rates = []
    for _ in range(100):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    config = ScheduleConfig(name="cosine", warmup_ratio=0.1)
    assert [lr_factor(config, step, 100) for step in range(37, 100)] == pytest.approx(rates[37:])


def test_a_base_whose_loss_is_not_finite_is_not_ready(recipe: Path, cli: Cli) -> None:
    """OpenBMB/MiniCPM-V#212: the loss was shown as 0.0 with a gradient norm of nan, and training went on for hours.

    Here: the check's trial sees that no loss is finite, says that the recipe is not ready, and exits with 2.
    """
    file = recipe.parent / "base" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    done = cli("train", "check", recipe, "--json")
    facts = json.loads(done.stdout)
    assert done.returncode == 2 and not facts["ready"]
    assert ["finite" in problem for problem in facts["problems"]] == [True]


def test_a_failed_check_is_not_exit_code_0(recipe: Path, cli: Cli) -> None:
    """modelscope/ms-swift#879: the command exited with 0 although the training had failed, so jobs counted as done.

    Here: whatever makes a run impossible, missing weights here, is exit code 2, and the last line says so.
    """
    (recipe.parent / "base" / "model.safetensors").unlink()
    done = cli("train", "check", recipe)
    assert done.returncode == 2 and done.stdout.splitlines()[-1].startswith(
        "not ready: model.name: base has no weights"
    )


def test_memory_is_estimated_for_what_runs_and_not_for_the_most() -> None:
    """AlexsJones/llmfit#302: models that ran well were said not to fit, because the longest context was assumed.

    Here: the estimate has the tokens that auto chooses, and on a CPU these are fewer than where a GPU is to be filled.
    """
    recipe = load_recipe("demo", ["training.batch_size=256", "training.epochs=1"]).recipe
    here, on_gpu = plan(recipe, None, on_cpu=True), plan(recipe, None)
    assert here.micro_batch_tokens <= 4096 < on_gpu.micro_batch_tokens <= 16_384
    assert here.memory_bytes["total"] == here.memory_bytes_least < on_gpu.memory_bytes["total"]
    assert on_gpu.memory_bytes_least < here.memory_bytes_least, "the search on a GPU may go down to one sequence"


@pytest.mark.parametrize("layers", [[-2, -1], [22, 23]])
def test_the_layers_that_are_named_are_those_that_train(layers: list[int]) -> None:
    """hiyouga/LlamaFactory#8993: all layers trained, whatever the number of trainable layers was set to.

    Here: the last two layers of GPT-2 medium, FT-Top2, have the published 25.19M parameters, and nothing else trains.
    """
    config = AutoConfig.for_model("gpt2", n_embd=1024, n_layer=24, n_head=16)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        attach(model, Full(layers=layers))
    assert sum(p.numel() for p in trainable(model).values()) == 25_192_448
    assert {name.split(".")[2] for name in trainable(model)} == {"22", "23"}


def test_a_setting_that_a_method_does_not_have_is_refused() -> None:
    """MakazhanAlpamys/Soup#745: an option that every trainer took was ignored by most of them without a word.

    Here: a key that the method does nothing with is an error that names the key, the method and the value.
    """
    with pytest.raises(UserError, match=r"adapter\.dropout: adapter\.method: full does not use it, got 0\.1; leave it"):
        load_recipe("demo", ["adapter.method=full", "adapter.dropout=0.1"])
