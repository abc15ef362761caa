"""Configurations of tiny models: name -> ``model_type``, values of the configuration, auto class that builds it.

Every model has four layers of width 32 where its configuration allows that, the vocabulary of the demo's tokenizer, and
no dropout. Windows are 8 tokens and chunks 16, far below the length of a row, so that neither can be ignored unseen.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Values = dict[str, Any]


class Spec(NamedTuple):
    model_type: str
    values: Values
    auto: str = "AutoModelForCausalLM"


# fmt: off
VOCABULARY = 726
ENDS: Values = {"bos_token_id": 0, "eos_token_id": 1}
COMMON: Values = {
    **ENDS, "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "pad_token_id": 0, "attention_dropout": 0.0, "hidden_dropout": 0.0, "tie_word_embeddings": False,
}

# Parts that several families share.
GPT: Values = {**ENDS, "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512}
NO_PDROP: Values = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FALCON: Values = {
    **ENDS, "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "hidden_dropout": 0.0, "attention_dropout": 0.0,
}
ENCODER: Values = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ALTERNATING: Values = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
MOE: Values = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "n_shared_experts": 1, "shared_expert_intermediate_size": 32,
}
GROUPED: Values = {"n_group": 1, "topk_group": 1}
DENSE_FIRST: Values = {**GROUPED, "first_k_dense_replace": 1}
MLA: Values = {
    **DENSE_FIRST, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "head_dim": 8, "num_key_value_heads": 4, "routed_scaling_factor": 1.0,
}
# With few heads many scores of the indexer are exactly zero, and which of them it selects depends on the padding.
INDEXER: Values = {"index_n_heads": 8, "index_head_dim": 8, "index_topk": 64}
DELTA: Values = {
    "layer_types": ["linear_attention"] * 3 + ["full_attention"], "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4,
}
CONV: Values = {"layer_types": ["conv", "conv", "full_attention", "conv"]}
MAMBA: Values = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_chunk_size": 16,
}
MAMBA1: Values = {"state_size": 8, "expand": 2, "conv_kernel": 4, "time_step_rank": 4}
GRANITE_HYBRID: Values = {
    **MAMBA, "layer_types": ["mamba", "mamba", "mamba", "attention"], "shared_intermediate_size": 32,
}
ZAMBA2: Values = {
    "mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 1, "chunk_size": 16,
    "use_mamba_kernels": False, "num_key_value_heads": 4, "adapter_rank": 4,
}
NO_JITTER: Values = {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0}
LLAMA4: Values = {**MOE, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 2, "attention_chunk_size": 16}
GEMMA3N: Values = {
    **ALTERNATING, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 1, "altup_num_inputs": 2, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4,
    "intermediate_size": [64] * 4,
}
GEMMA4: Values = {
    **ALTERNATING, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0, "global_head_dim": 8,
}
QUERY8: Values = {"query_pre_attn_scalar": 8}
MROPE: Values = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
}
VISION: Values = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14, "num_channels": 3,
}
QWEN_VISION: Values = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 14, "out_hidden_size": 32,
    "spatial_merge_size": 2, "temporal_patch_size": 2,
}
QWEN3_VISION: Values = {**QWEN_VISION, "num_position_embeddings": 16}
SIGLIP: Values = {"model_type": "siglip_vision_model", **VISION}
IMAGE_TOKENS: Values = {
    "image_token_id": 700, "image_token_index": 700, "video_token_id": 701, "vision_start_token_id": 702,
    "vision_end_token_id": 703, "boi_token_id": 704, "eoi_token_id": 705, "boi_token_index": 704,
    "eoi_token_index": 705,
}


def text(*parts: Values, **values: Any) -> Values:
    """Values of a text model: the common ones, over them each part in turn, and over these the named values."""
    merged = dict(COMMON)
    for part in (*parts, values):
        merged.update(part)
    return merged


def lm(model_type: str, *parts: Values, **values: Any) -> Spec:
    return Spec(model_type, text(*parts, **values))


def masked(model_type: str, *parts: Values, **values: Any) -> Spec:
    return Spec(model_type, text(*parts, **values), "AutoModelForMaskedLM")


def vision(model_type: str, text_values: Values, vision_values: Values, **values: Any) -> Spec:
    parts = {"text_config": text_values, "vision_config": vision_values, "tie_word_embeddings": False}
    return Spec(model_type, {**parts, **IMAGE_TOKENS, **values}, "AutoModelForImageTextToText")


DECODERS: dict[str, Spec] = {
    "llama": lm("llama"),
    "llama_tied": lm("llama", tie_word_embeddings=True),
    "mistral_sw8": lm("mistral", sliding_window=8),
    "ministral": lm("ministral", ALTERNATING),
    "ministral3": lm("ministral3"),
    "qwen2": lm("qwen2"),
    "qwen2_sw": lm("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2),
    "qwen3": lm("qwen3"),
    "gemma": lm("gemma"),
    "gemma2": lm("gemma2", QUERY8, sliding_window=8),
    "gemma3_text": lm("gemma3_text", ALTERNATING, QUERY8),
    "vaultgemma": lm("vaultgemma", QUERY8, sliding_window=8),
    "gemma3n_text": lm("gemma3n_text", GEMMA3N),
    "gemma4_text": lm("gemma4_text", GEMMA4),
    "phi": lm("phi", resid_pdrop=0.0, embd_pdrop=0.0),
    "phi3": lm("phi3", resid_pdrop=0.0, embd_pdrop=0.0, sliding_window=8),
    "gpt2": Spec("gpt2", {**GPT, **NO_PDROP}),
    "gpt2_default_dropout": Spec("gpt2", GPT),
    "gpt_bigcode": Spec("gpt_bigcode", {**GPT, **NO_PDROP}),
    "gptj": Spec("gptj", {**GPT, **NO_PDROP, "rotary_dim": 8, "tie_word_embeddings": False}),
    "gpt_neo": Spec("gpt_neo", {
        **ENDS, "vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 4, "num_heads": 4, "window_size": 8,
        "max_position_embeddings": 512, "attention_types": [[["global", "local"], 2]], "resid_dropout": 0.0,
        "embed_dropout": 0.0, "attention_dropout": 0.0,
    }),
    "codegen": Spec("codegen", {**GPT, **NO_PDROP, "rotary_dim": 8, "tie_word_embeddings": False}),
    "gpt_neox": lm("gpt_neox"),
    "starcoder2": lm("starcoder2", sliding_window=8, residual_dropout=0.0, embedding_dropout=0.0),
    "opt": lm("opt", ffn_dim=64, word_embed_proj_dim=32, dropout=0.0, pad_token_id=1, eos_token_id=1),
    "bloom": Spec("bloom", {
        **ENDS, "vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 4, "n_head": 4, "hidden_dropout": 0.0,
        "attention_dropout": 0.0, "pad_token_id": 3,
    }),
    "falcon_rope": Spec("falcon", {**FALCON, "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi": Spec("falcon", {**FALCON, "alibi": True, "multi_query": False}),
    "mpt": Spec("mpt", {
        **ENDS, "vocab_size": VOCABULARY, "d_model": 32, "n_layers": 4, "n_heads": 4, "expansion_ratio": 2,
        "max_seq_len": 512,
    }),
    "stablelm": lm("stablelm"),
    "cohere": lm("cohere", logit_scale=0.25),
    "cohere2": lm("cohere2", ALTERNATING, logit_scale=0.25),
    "granite": lm("granite"),
    "granite_swa": lm("granite_swa"),
    "olmo": lm("olmo"),
    "olmo2": lm("olmo2"),
    "olmo3": lm("olmo3", ALTERNATING),
    "smollm3": lm("smollm3", no_rope_layers=[1, 1, 1, 0]),
    "glm": lm("glm"),
    "glm4": lm("glm4"),
    "nemotron": lm("nemotron"),
    "helium": lm("helium"),
    "exaone4": lm("exaone4", ALTERNATING),
    "hunyuan_v1_dense": lm("hunyuan_v1_dense"),
    "seed_oss": lm("seed_oss", residual_dropout=0.0),
    "ernie4_5": lm("ernie4_5"),
    "bitnet": lm("bitnet"),
    "apertus": lm("apertus"),
    "arcee": lm("arcee"),
    "doge": lm("doge"),
    "doge_sw8": lm("doge", sliding_window=8),
    "diffllama": lm("diffllama"),
    "persimmon": lm("persimmon"),
    "nanochat": lm("nanochat"),
    "modernbert-decoder": lm(
        "modernbert-decoder", local_attention=8, global_attn_every_n_layers=2, mlp_dropout=0.0, embedding_dropout=0.0,
        sliding_window=8,
    ),
    "xglm": Spec("xglm", {
        **ENDS, "vocab_size": VOCABULARY, "d_model": 32, "ffn_dim": 64, "num_layers": 4, "attention_heads": 4,
        "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "max_position_embeddings": 512,
        "pad_token_id": 1,
    }),
    "biogpt": lm("biogpt", ENCODER, activation_dropout=0.0),
    "minicpm3": lm("minicpm3", MLA),
    "youtu": lm("youtu", MLA),
    "internlm3": lm("internlm3"),
    "jais2": lm("jais2"),
    "cwm": lm("cwm", sliding_window=8),
    "hyperclovax": lm("hyperclovax"),
    "blt": Spec("blt", {
        "vocab_size": VOCABULARY, "num_hidden_layers": 4, "encoder_hash_byte_group_vocab": 100,
        "local_attention_window_len": 8, "patching_mode": "space", "patch_in_forward": False, "patcher_config": text(),
        **{f"{part}_config": text(hidden_size_global=64, num_key_value_heads=4) for part in ("encoder", "decoder")},
        "global_config": text(hidden_size=64, head_dim=16, num_key_value_heads=4),
    }),
}

EXPERTS: dict[str, Spec] = {
    "mixtral": lm("mixtral", MOE),
    "mixtral_sw8": lm("mixtral", MOE, sliding_window=8),
    "qwen2_moe": lm("qwen2_moe", MOE),
    "qwen2_moe_sw8": lm("qwen2_moe", MOE, ALTERNATING, use_sliding_window=True, max_window_layers=2),
    "qwen3_moe": lm("qwen3_moe", MOE),
    "gemma4_moe_text": lm(
        "gemma4_text", GEMMA4, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=32,
        hidden_size_per_layer_input=0,
    ),
    "phimoe": lm("phimoe", MOE, NO_JITTER),
    "phimoe_sw8": lm("phimoe", MOE, NO_JITTER, sliding_window=8),
    "cohere2_moe": lm("cohere2_moe", MOE, ALTERNATING, logit_scale=0.25),
    "granitemoe": lm("granitemoe", MOE),
    "granitemoeshared": lm("granitemoeshared", MOE, shared_intermediate_size=32),
    "olmoe": lm("olmoe", MOE),
    "flex_olmo": lm("flex_olmo", MOE),
    "deepseek_v2": lm("deepseek_v2", MOE, MLA),
    "deepseek_v3": lm("deepseek_v3", MOE, MLA),
    "deepseek_v32": lm("deepseek_v32", MOE, MLA, INDEXER),
    "deepseek_v4": lm("deepseek_v4", MOE, MLA),
    "gpt_oss": lm("gpt_oss", MOE, ALTERNATING),
    "llama4_text": lm("llama4_text", LLAMA4),
    "glm4_moe": lm("glm4_moe", MOE, DENSE_FIRST, partial_rotary_factor=0.5),
    "glm4_moe_lite": lm("glm4_moe_lite", MOE, MLA),
    "glm_moe_dsa": lm("glm_moe_dsa", MOE, MLA, INDEXER),
    "exaone_moe": lm("exaone_moe", MOE, ALTERNATING, DENSE_FIRST),
    "hunyuan_v1_moe": lm("hunyuan_v1_moe", MOE, moe_topk=2),
    "ernie4_5_moe": lm(
        "ernie4_5_moe", MOE, moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=1,
    ),
    "minimax_m2": lm("minimax_m2", MOE, rotary_dim=8),
    "dbrx": Spec("dbrx", {
        **ENDS, "vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    }),
    "dots1": lm("dots1", MOE, DENSE_FIRST),
    "doge_moe": lm("doge", MOE, is_moe=True),
    "jetmoe": lm("jetmoe", MOE, kv_channels=8),
    "longcat_flash": lm(
        "longcat_flash", MOE, MLA, num_layers=2, ffn_hidden_size=64, expert_ffn_hidden_size=32, zero_expert_num=1,
        moe_topk=2,
    ),
    "solar_open": lm("solar_open", MOE, DENSE_FIRST),
    "mimo_v2_flash": lm("mimo_v2_flash", MOE, GROUPED),
    "afmoe": lm("afmoe", MOE, GROUPED, num_dense_layers=1, num_shared_experts=1, sliding_window=8),
    "hy_v3": lm("hy_v3", MOE),
    "zaya": lm("zaya", MOE, num_experts_per_tok=1, router_hidden_size=16),
}

STATE_SPACE: dict[str, Spec] = {
    "qwen3_next": lm("qwen3_next", MOE, DELTA),
    "qwen3_5_text": lm("qwen3_5_text", DELTA),
    "qwen3_5_moe_text": lm("qwen3_5_moe_text", MOE, DELTA),
    "granitemoehybrid": lm("granitemoehybrid", MOE, GRANITE_HYBRID),
    "granite4_dense_hybrid": lm("granitemoehybrid", GRANITE_HYBRID, num_local_experts=0, num_experts_per_tok=0),
    "olmo_hybrid": lm("olmo_hybrid", DELTA),
    "nemotron_h": lm(
        "nemotron_h", MOE, GROUPED, layers_block_type=["mamba", "attention", "mamba", "moe"], mamba_num_heads=8,
        mamba_head_dim=8, ssm_state_size=8, n_groups=1, chunk_size=16, conv_kernel=4,
        moe_shared_expert_intermediate_size=32,
    ),
    "mamba": lm("mamba", MAMBA1),
    "falcon_mamba": lm("falcon_mamba", MAMBA1),
    "mamba2": lm("mamba2", num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=16, expand=2),
    "jamba": lm(
        "jamba", MOE, attn_layer_period=4, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False,
    ),
    "zamba": lm(
        "zamba", attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4, n_mamba_heads=2,
        use_mamba_kernels=False, num_key_value_heads=4, layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
    ),
    "zamba2": lm(
        "zamba2", ZAMBA2, num_hidden_layers=5, num_mem_blocks=1, use_shared_attention_adapter=False,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid", "hybrid"],
    ),
    "zamba2_2blocks": lm(
        "zamba2", ZAMBA2, num_hidden_layers=6, num_mem_blocks=2, use_shared_attention_adapter=False,
        layers_block_type=["mamba", "hybrid"] * 3,
    ),
    "bamba": lm("bamba", MAMBA, attn_layer_indices=[1]),
    "falcon_h1": lm("falcon_h1", MAMBA, mamba_d_ssm=64),
    "recurrent_gemma": lm(
        "recurrent_gemma", lru_width=32, attention_window_size=8, block_types=["recurrent", "recurrent", "attention"],
    ),
    "rwkv": lm("rwkv", attention_hidden_size=32, context_length=512),
    "xlstm": lm("xlstm", num_heads=4, qk_dim_factor=0.5, v_dim_factor=1.0, num_blocks=4, chunk_size=16),
    "minimax": lm("minimax", MOE, layer_types=["linear_attention", "full_attention"] * 2, block_size=16),
    "qwen4_exp_text": lm(
        "qwen4_exp_text", MOE, DELTA, hc_count=2, hc_lowrank=8, indexer_n_heads=2, indexer_kv_heads=1,
        indexer_head_dim=8, indexer_budget=64, indexer_compress_ratio=4,
    ),
    "kimi_linear": lm("kimi_linear", MOE, MLA, DELTA, linear_head_dim=8, linear_num_heads=4),
    "lfm2": lm("lfm2", CONV, block_ff_dim=64, conv_L_cache=3),
    "lfm2_moe": lm("lfm2_moe", MOE, CONV, num_dense_layers=1),
    "lfm3": lm("lfm3", CONV),
    "bailing_hybrid": lm("bailing_hybrid", MOE, MLA),
}

ENCODERS: dict[str, Spec] = {
    "bert_mlm": masked("bert", ENCODER),
    "bert_cls": Spec("bert", text(ENCODER), "AutoModelForSequenceClassification"),
    "roberta_mlm": masked("roberta", ENCODER, max_position_embeddings=520, pad_token_id=1),
    "deberta_v2": masked("deberta-v2", ENCODER),
    "modernbert": masked("modernbert"),
    "electra": masked("electra", ENCODER, embedding_size=32),
    "t5": Spec("t5", {
        "vocab_size": VOCABULARY, "d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8,
        "decoder_start_token_id": 0,
    }, "AutoModelForSeq2SeqLM"),
    "bart": Spec("bart", {
        **ENDS, "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "max_position_embeddings": 512, "dropout": 0.0, "pad_token_id": 1, "decoder_start_token_id": 1,
        "forced_eos_token_id": 1,
    }, "AutoModelForSeq2SeqLM"),
    "t5gemma": Spec("t5gemma", {
        "vocab_size": VOCABULARY, "encoder": text(ALTERNATING, QUERY8), "decoder": text(ALTERNATING, QUERY8),
    }, "AutoModelForSeq2SeqLM"),
}

VISION_LANGUAGE: dict[str, Spec] = {
    "gemma3_vl": vision(
        "gemma3", text(ALTERNATING, QUERY8, model_type="gemma3_text"), SIGLIP, mm_tokens_per_image=4,
    ),
    "gemma3n_vl": vision(
        "gemma3n", text(GEMMA3N, model_type="gemma3n_text"), {"model_type": "gemma3n_vision", "hidden_size": 32},
        audio_config={"hidden_size": 32, "conf_num_hidden_layers": 1, "conf_num_attention_heads": 4},
    ),
    "gemma4_vl": vision(
        "gemma4", text(GEMMA4, model_type="gemma4_text"),
        {"model_type": "gemma4_vision", **VISION, "num_key_value_heads": 4, "head_dim": 8, "global_head_dim": 8},
        audio_config=None,
    ),
    "mistral3_vl": vision("mistral3", text(model_type="mistral"), {"model_type": "pixtral", **VISION, "head_dim": 8}),
    "llava": vision(
        "llava", text(model_type="llama"), {"model_type": "clip_vision_model", **VISION, "projection_dim": 32},
    ),
    "qwen2_5_vl": vision("qwen2_5_vl", text(MROPE), QWEN_VISION),
    "qwen2_vl": vision(
        "qwen2_vl", text(MROPE),
        {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14},
    ),
    "qwen3_vl": vision("qwen3_vl", text(MROPE), {**QWEN3_VISION, "deepstack_visual_indexes": [0]}),
    "qwen3_vl_moe": vision("qwen3_vl_moe", text(MROPE, MOE), {**QWEN3_VISION, "deepstack_visual_indexes": [0]}),
    "qwen3_5_vl": vision("qwen3_5", text(MROPE, DELTA), QWEN3_VISION),
    "qwen3_5_moe_vl": vision("qwen3_5_moe", text(MROPE, DELTA, MOE), QWEN3_VISION),
    "llama4_vl": vision("llama4", text(LLAMA4), {
        **VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
        "pixel_shuffle_ratio": 0.5,
    }),
    "mllama": vision("mllama", text(cross_attention_layers=[1]), {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1,
        "attention_heads": 4, "image_size": 28, "patch_size": 14, "vision_output_dim": 64,
        "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]],
    }),
    "paligemma": vision(
        "paligemma", text(model_type="gemma"), {**SIGLIP, "projection_dim": 32}, projection_dim=32,
    ),
    "smolvlm": vision("smolvlm", text(model_type="llama"), VISION),
    "internvl": vision(
        "internvl", text(model_type="qwen2"),
        {"model_type": "internvl_vision", **VISION, "image_size": [28, 28], "patch_size": [14, 14]},
    ),
    "kimi_k25": vision("kimi_k25", text(MOE, MLA, model_type="deepseek_v3"), {}),
    "phi4_multimodal": lm(
        "phi4_multimodal", vision_config={**VISION, "crop_size": 28}, resid_pdrop=0.0, embd_pdrop=0.0,
        audio_config={"hidden_size": 32, "intermediate_size": 64, "num_blocks": 1, "num_attention_heads": 4},
    ),
}
# fmt: on

FAMILIES: dict[str, Spec] = {**DECODERS, **EXPERTS, **STATE_SPACE, **ENCODERS, **VISION_LANGUAGE}

UNBUILT: dict[str, str] = {
    "gemma3n_vl": "its vision tower needs timm, which is not a dependency of this project",
}
"""Configurations that the installed transformers cannot build at this size, with the reason."""
