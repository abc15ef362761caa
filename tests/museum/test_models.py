"""Public reports of what went wrong with models elsewhere, each with a test that it does not happen here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rasa_train import RaSA, adapt
from rasa_train.adapters.state import adapters
from tests.families.harness import LOSS, Case, Outcome, Refused, build
from tests.families.specs import FAMILIES, Spec, lm

TWO_LAYERS: dict[str, Any] = {"num_hidden_layers": 2}


def edit_weights(case: Case, rename: Any) -> None:
    """Write the base again with the names that ``rename`` gives; None leaves a tensor out."""
    path = case.directory / "base" / "model.safetensors"
    named = {rename(name): tensor for name, tensor in load_file(path).items()}
    save_file({name: tensor for name, tensor in named.items() if name is not None}, path, {"format": "pt"})


def assert_refused(case: Case, *words: str) -> None:
    with pytest.raises(Refused) as refusal:
        case.fit("length-grouped", 1)
    assert [word for word in words if word not in str(refusal.value)] == []


def assert_right_or_refused(outcome: Outcome) -> None:
    assert outcome.kind in ("ok", "refused"), outcome


def random_model(spec: Spec) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(spec.model_type, **spec.values))
    return model.eval()


def look_ahead(spec: Spec) -> float:
    """How far the last token moves logits before it, in a model of transformers."""
    model = random_model(spec)
    ids = torch.arange(5, 25)[None]
    other = ids.clone()
    other[0, -1] = 50
    with torch.no_grad():
        return float((model(input_ids=ids).logits - model(input_ids=other).logits)[0, :-1].abs().max())


# -- weights that are not in the files -------------------------------------------------------------------------------


def test_a_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    """huggingface/transformers#13233: a GPT-Neo checkpoint was loaded as GPT-2; a warning named the newly initialised
    weights, and the text that came out was random.

    Here: the base is refused before the first step, with the names of weights that its files lack.
    """
    case = Case(FAMILIES["gpt2"], tmp_path)
    build(FAMILIES["gpt_neo"], tmp_path / "neo")
    (tmp_path / "neo" / "model.safetensors").replace(tmp_path / "base" / "model.safetensors")
    assert_refused(case, "c_attn.weight")


def test_names_under_a_foreign_prefix(tmp_path: Path) -> None:
    """huggingface/transformers#29659: a merged Gemma was saved under names that its class does not know; every layer
    was newly initialised when it was loaded.

    Here: such a base is refused before the first step.
    """
    case = Case(lm("gemma", **TWO_LAYERS), tmp_path)
    edit_weights(case, lambda name: f"base_model._orig_module.{name}")
    assert_refused(case, "model.embed_tokens.weight", "base_model._orig_module.model")


def test_a_head_that_is_not_stored_twice(tmp_path: Path) -> None:
    """fabienfrfr/tptt#1: a Llama with tied embeddings has no head in its files, and loading it said that the head was
    newly initialised.

    Here: a tied head is not a missing one: the base trains, with the loss of transformers.
    """
    case = Case(lm("llama", tie_word_embeddings=True, **TWO_LAYERS), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "base" / "model.safetensors")
    assert case.train().kind == "ok"


def test_weights_in_another_library_s_packing(tmp_path: Path) -> None:
    """Blaizzy/mlx-audio#902: a quantised checkpoint whose layout the loader did not know gave a model of random
    weights, without an error or a warning.

    Here: packed integers under the names of dense weights are refused before the first step.
    """
    case = Case(lm("llama", **TWO_LAYERS), tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    packed = {}
    for name, tensor in load_file(path).items():
        if name.endswith("_proj.weight"):
            packed[name] = torch.zeros(tensor.shape[0], tensor.shape[1] // 4, dtype=torch.uint32)
            packed[name.replace(".weight", ".scales")] = torch.ones(tensor.shape[0], 1)
        else:
            packed[name] = tensor
    save_file(packed, path, {"format": "pt"})
    assert_refused(case, "_proj")


# -- models that see the answer --------------------------------------------------------------------------------------


def test_an_encoder_is_not_a_language_model(tmp_path: Path) -> None:
    """huggingface/transformers#7495: BertLMHeadModel was taken for a model that predicts the next token, as GPT-2 does;
    without `is_decoder` it sees that token.

    Here: a base whose last token moves earlier logits is refused before the first step.
    """
    assert look_ahead(FAMILIES["bert_mlm"]) > LOSS
    assert_refused(Case(FAMILIES["bert_mlm"], tmp_path))


def test_an_encoder_that_was_made_a_decoder(tmp_path: Path) -> None:
    """huggingface/transformers#12704: nobody could find the causal mask of a BERT with `is_decoder`.

    Here: what the model does counts, not what it is called: this one is causal, so it trains, with transformers' loss.
    """
    spec = FAMILIES["bert_mlm"]
    case = Case(Spec("bert", {**spec.values, **TWO_LAYERS, "is_decoder": True}), tmp_path)
    assert case.base_faults() == []
    assert case.train().kind == "ok"


def test_a_decoder_that_lost_its_mask(tmp_path: Path) -> None:
    """huggingface/transformers#48745: since 5.9.0 RoFormer and three others attended to later tokens even with
    `is_decoder`; the loss of next-token training fell to almost nothing.

    Here: with a transformers that has the fault the base is refused; with one that has not, it trains.
    """
    spec = Spec("roformer", {**FAMILIES["bert_mlm"].values, **TWO_LAYERS, "is_decoder": True, "embedding_size": 32})
    case = Case(spec, tmp_path)
    if look_ahead(spec) > LOSS:
        assert_refused(case)
    else:
        assert case.train().kind == "ok"


# -- sequences that share a row --------------------------------------------------------------------------------------


def test_packed_sequences_do_not_attend_to_each_other(tmp_path: Path) -> None:
    """huggingface/trl#805: with packing, a sample attended to the samples before it in its row, kept apart by an end
    token alone.

    Here: the loss of a packed batch is that of its sequences one by one.
    """
    assert Case(lm("llama", **TWO_LAYERS), tmp_path).packed().kind == "ok"


def test_positions_start_again_in_a_packed_row(tmp_path: Path) -> None:
    """huggingface/nanoVLM#201: the positions of a packed sample went on from the sample before it.

    Here: they start at zero, which a model with an embedding for each position (GPT-2) would show at once.
    """
    assert Case(FAMILIES["gpt2"], tmp_path).packed().kind == "ok"


def test_a_recurrent_state_is_not_carried_over(tmp_path: Path) -> None:
    """EvolvingLMMs-Lab/lmms-engine#167: the state of Qwen3.5's gated delta rule, and its convolution, ran across the
    samples of a packed row; training learned slightly wrong objectives without a word.

    Here: packing is refused for this family, or gives the loss of the sequences one by one.
    """
    case = Case(FAMILIES["qwen3_5_text"], tmp_path)
    assert_right_or_refused(case.outcome(case.packed))


def test_a_convolution_does_not_cross_sequences(tmp_path: Path) -> None:
    """unslothai/unsloth#7249: the convolution of hybrid models leaks across the boundaries of packed sequences, which a
    look at the attention alone does not find.

    Here: RecurrentGemma, whose attention can be packed and whose convolution cannot, is refused or right.
    """
    case = Case(FAMILIES["recurrent_gemma"], tmp_path)
    assert_right_or_refused(case.outcome(case.packed))


@pytest.mark.parametrize("batching", ["length-grouped", "packed"])
def test_a_window_reaches_the_attention(batching: str, tmp_path: Path) -> None:
    """unslothai/unsloth#8253: the sliding window of a Mistral never reached torch's attention, so rows longer than the
    window attended to all of their past in ordinary training steps.

    Here: with a window of 8 tokens the loss is that of transformers' own eager attention, padded and packed.
    """
    case = Case(lm("mistral", sliding_window=8, attn_implementation="eager", **TWO_LAYERS), tmp_path)
    assert (case.train if batching == "length-grouped" else case.packed)().kind == "ok"


@pytest.mark.parametrize("name", ["qwen2_sw", "qwen2_moe_sw8", "phimoe_sw8"])
def test_a_window_that_the_attention_does_not_implement(name: str, tmp_path: Path) -> None:
    """hiyouga/LlamaFactory#7063: a window was enabled that the attention in use did not implement; a warning promised
    unexpected results, and training went on.

    Here: packing gives the loss of the windowed model, or is refused, wherever the family keeps its window.
    """
    case = Case(FAMILIES[name], tmp_path)
    assert_right_or_refused(case.outcome(case.packed))


def test_a_soft_cap_is_not_dropped(tmp_path: Path) -> None:
    """sgl-project/sglang#33915: an attention backend took Gemma 2's soft cap and silently ignored it.

    Here: packing, whose kernel has no soft caps, is refused and says so.
    """
    case = Case(FAMILIES["gemma2"], tmp_path)
    with pytest.raises(Refused, match="soft cap"):
        case.fit("packed", 1)


# -- what is adapted -------------------------------------------------------------------------------------------------


def test_a_vision_tower_is_left_alone(tmp_path: Path) -> None:
    """haotian-liu/LLaVA#1647: LoRA was put on the frozen vision tower too, and counted as trainable.

    Here: all-linear means the text decoder.
    """
    case = Case(FAMILIES["gemma3_vl"], tmp_path)
    case.fit("length-grouped", 1)
    assert [path for path in case.sites() if "vision" in path] == []
    assert any("language_model" in path for path in case.sites())


def test_an_audio_tower_is_left_alone(tmp_path: Path) -> None:
    """Roblox/FAI-RL#105: text runs of Gemma 4 put adapters on towers that no text reaches, and ended with parameters
    that were not used.

    Here: neither tower of Phi-4-multimodal is adapted, and a gradient reaches every adapter.
    """
    case = Case(FAMILIES["phi4_multimodal"], tmp_path)
    case.fit("length-grouped", 2)
    sites = case.sites()
    assert [path for path in sites if "audio" in path or "image" in path] == []
    assert [path for path, B in sites.items() if not B.any()] == []


@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe", "gemma4_moe_text", "doge_moe"])
def test_a_router_is_left_alone(name: str) -> None:
    """foundation-model-stack/fms-hf-tuning#545: all-linear took in the router, and the server refused the adapter.

    Here: routers under all of their names are left alone.
    """
    adapted = adapters(adapt(random_model(FAMILIES[name]), RaSA(r=4, k=1, alpha=8)))
    routers = {"router", "gate", "router_gate", "shared_expert_gate"}
    assert adapted and [path for path in adapted if routers & set(path.split("."))] == []


# -- adapters that no gradient reaches -------------------------------------------------------------------------------


def test_a_linear_whose_weight_is_read_without_calling_it(tmp_path: Path) -> None:
    """state-spaces/mamba#279: Mamba reads the weights of its linears without calling them, so LoRA on these linears
    never got a gradient.

    Here: such a linear (dt_proj) is not adapted, or the run names it; a gradient reaches all others.
    """
    case = Case(FAMILIES["mamba"], tmp_path)
    said = case.fit("length-grouped", 2)
    dead = {path.rpartition(".")[2] for path, B in case.sites().items() if not B.any()}
    assert [name for name in dead if name not in said] == [] and len(case.sites()) > len(dead)


def test_every_linear_of_mamba2_learns(tmp_path: Path) -> None:
    """huggingface/peft#2274: Mamba2's kernels are given the weight of `out_proj`, past the LoRA that wraps it.

    Here: a gradient reaches the adapters of both projections of every layer, and merging keeps what they learned.
    """
    case = Case(FAMILIES["mamba2"], tmp_path)
    case.fit("length-grouped", 2)
    learned = {path.rpartition(".")[2] for path, B in case.sites().items() if B.any()}
    assert learned == {"in_proj", "out_proj"} and len(case.sites()) == 8
    assert case.merge().kind == "ok"


def test_recomputed_layers_get_their_gradient(tmp_path: Path) -> None:
    """locuslab/open-unlearning#178: with recomputed layers and a frozen embedding no gradient reached the adapters of
    the transformer's layers, and training looked healthy.

    Here: with recomputed layers every adapter learns.
    """
    case = Case(FAMILIES["llama"], tmp_path)
    case.fit("length-grouped", 2, "training.activation_checkpointing=true")
    assert [path for path, B in case.sites().items() if not B.any()] == []
