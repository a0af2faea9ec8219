"""Tiny random models of the decoder families in transformers, with whatever their configs can switch set to other than
the default."""

import re
from copy import deepcopy
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline.backbone.architecture import (
    RANDOM,
    attention,
    check_dropout_is_off,
    check_model,
    probe,
    switch_off_dropout,
)
from pipeline.backbone.loading import context_length
from pipeline.backbone.trunk import trunk_fault


LAYERS, HIDDEN, VOCABULARY = 3, 32, 96
SIZES = {
    LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers depth",
    HIDDEN: "hidden_size n_embd d_model dim emb_dim embedding_size embedding_dim attention_hidden_size lru_width "
    "hidden_size_per_layer_input_proj projection_dim out_hidden_size embed_dim",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts sliding_window sliding_window_size window_size attention_chunk_size linear_num_value_heads "
    "attention_window index_n_heads linear_num_heads swa_num_attention_heads attention_window_size",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts n_group "
    "num_expert_group topk_group linear_num_key_heads swa_num_key_value_heads",
    1: "n_shared_experts num_shared_experts num_kv_shared_layers num_nextn_predict_layers moe_num_shared_experts "
    "first_k_dense_replace num_dense_layers",
    8: "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim kv_channels global_head_dim hidden_size_per_layer_input "
    "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head d_head swa_head_dim index_head_dim",
    16: "q_lora_rank kv_lora_rank word_embed_proj_dim mamba_d_state state_size ssm_state_size mamba_head_dim",
    48: "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim moe_intermediate_size ffn_hidden_size "
    "shared_expert_intermediate_size shared_experts_intermediate_size intermediate_size_mlp expert_ffn_hidden_size "
    "block_ff_dim dense_intermediate_size shared_intermediate_size feed_forward_size",
    64: "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length context_length model_max_length "
    "max_target_positions max_source_positions",
    VOCABULARY: "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size",
}
SWITCHES = {
    0.2: "initializer_range init_std initializer_factor",
    3.0: "final_logit_softcapping logits_scaling logits_soft_cap output_logit_soft_cap",
    5.0: "attn_logit_softcapping",
    0.3: "logit_scale attention_multiplier lm_head_multiplier",
    2.0: "embedding_multiplier scale_emb",
    0.5: "residual_multiplier scale_depth key_multiplier ssm_in_multiplier attention_in_multiplier",
    True: "use_sliding_window scale_embedding",
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}  # heads times their size are twice the width
OWN = {  # what a family's sizes must be to fit each other
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "diffllama": {"attention_dropout": 0.0},
    "mpt": {"attn_config": {"clip_qkv": 1.0, "softmax_scale": 0.3, "alibi_bias_max": 4}},
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), {"num_kv_shared_layers": 0}),
    "falcon_h1": {"mamba_d_ssm": 64, **_MAMBA},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "mamba_headdim": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "kv_channels": 8,
        "chunk_size": 8,
    },
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e3}},
    },
    # Of these the first three layers would all be linear, which no checkpoint's are.
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp", "qwen4_exp_text"),
        {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    **dict.fromkeys(
        ("kimi_linear", "bailing_hybrid"), {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    ),
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "zaya": {"num_experts_per_tok": 1},
    "dbrx": {
        "tie_word_embeddings": False,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.0, "attn_pdrop": 0.1, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    **dict.fromkeys(("dots3_note", "dots3_note_text"), {"per_layer_config": {}, "head_dim": 16}),
    "roc_bert": {
        "pronunciation_vocab_size": 9,
        "shape_vocab_size": 9,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local"] * LAYERS,
        "axial_pos_embds": False,
        "local_attn_chunk_length": 4,
        "attention_head_size": 8,
    },
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}


def tiny_config(model_type: str, **changes) -> PreTrainedConfig:
    """Return a small config of a family, with switches set; `changes` come last, and into the text's part of a config."""
    return _small(AutoConfig.for_model(model_type), OWN.get(model_type, {}) | changes)


def _small(default: PreTrainedConfig, changes: dict) -> PreTrainedConfig:
    """Return a config of the same class, of small sizes, with small parts."""
    known = default.to_dict()
    text = default.get_text_config(decoder=True)
    parts = {
        name: part
        for name in default.sub_configs
        if isinstance(part := getattr(default, name, None), PreTrainedConfig)
    }
    parts = {name: part for name, part in parts.items() if name not in changes}
    if any(part is text for part in parts.values()):
        kept = {name: _small(part, changes if part is text else {}) for name, part in parts.items()}
        return type(default)(**kept | {"tie_word_embeddings": _flipped(text.to_dict())})
    wanted = {name: value for table in (SIZES, SWITCHES) for value, names in table.items() for name in names.split()}
    wanted |= SPECIAL | {name: 0.1 for name, value in known.items() if RANDOM.search(name) and type(value) is float}
    if "kv_lora_rank" in known:  # each head has keys of its own
        wanted["num_key_value_heads"] = wanted["num_attention_heads"]
    if "tie_word_embeddings" in known:
        wanted["tie_word_embeddings"] = _flipped(known)
    given = {name: value for name, value in wanted.items() if name in known}
    return type(default)(**given | {name: _small(part, {}) for name, part in parts.items()} | changes)


def _flipped(known: dict) -> bool:
    return not known.get("tie_word_embeddings", False)


def tiny_model(model_type: str, **changes) -> PreTrainedModel:
    """Return a random model of a family, in evaluation mode."""
    torch.manual_seed(0)
    config = tiny_config(model_type, **changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").requires_grad_(False).eval()


TABLE = Path(__file__).parents[1] / "docs" / "families.md"
LARGEST = 10_000_000  # parameters: a family whose config is not made small by the sizes above is not tried
HEADER = """# Families of language models

Of each family of causal language models in transformers {version}, a tiny random model was put to the checks that a run puts
to the user's model (`pipeline/backbone/architecture.py`). What its config can switch (soft caps, scales, windows, dropout, a
tied or untied head) had other values than the default. A checkpoint can still be refused for what it alone has.

- *Language model*: served, or why SFT or PPO refuses it. Logprobs and values of a served one are those of its own forward.
- *Trunk*: with `lora_top_layers` the layers below run once a rollout, or why they run in every pass.
- *Reward model*: a sequence classifier of it can be trained, or why not. PPO can then take reward functions.

`python -m tests.families` writes this file.

| Family | Language model | Trunk | Reward model |
|---|---|---|---|
"""


def row(family: str) -> str:
    """Return a family's line of the table, from what a tiny model of it does."""
    return f"| {family} | {' | '.join(verdicts(family))} |"


def verdicts(family: str) -> tuple[str, str, str]:
    """Return what the table says of a family's language model, trunk and reward model."""
    try:
        with torch.device("meta"):
            planned = AutoModelForCausalLM.from_config(tiny_config(family), attn_implementation="eager")
        size = sum(parameter.numel() for parameter in planned.parameters())
        if size > LARGEST:
            return f"not tried: its tiny model would have {size:,} parameters", "", ""
        base = tiny_model(family)
        base.config.get_text_config().pad_token_id = SPECIAL["pad_token_id"]  # as `load_pretrained` does
        ids, mask = probe(base)
        base(input_ids=ids[:1], use_cache=False)
    except Exception as error:  # sizes that do not fit each other, or a package that is not installed
        return f"not tried: {_short(error)}", "", ""
    try:
        check_model(base, family)
        context_length(base)
        classifier = deepcopy(base.config)
        fault = _trunk_fault(base, ids, mask)
        switch_off_dropout(base)
        check_dropout_is_off(base, family)
    except ValueError as error:
        return f"refused: {_reason(error, base)}", "", ""
    return "served", f"no: {fault}" if fault else "shared", _reward_model(classifier, family)


def _trunk_fault(base: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> str | None:
    """Return why the layers below run in every pass, without numbers, which differ between machines, or None."""
    try:
        fault = trunk_fault(base, LAYERS - 2, ids, **attention(base, mask))
    except ValueError as error:  # no list of layers
        return _reason(error, base)
    if fault and not fault.startswith("hidden states differ"):
        return f"layers do not run from hidden states alone ({fault.split(':')[0]})"
    return fault and "a pass from its states is not the full pass"


def _reward_model(config: PreTrainedConfig, family: str) -> str:
    config.num_labels = 1
    torch.manual_seed(0)
    try:
        model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        return "no: transformers has no sequence classifier of it"
    if not isinstance(getattr(model, "score", None), nn.Linear):
        return "no: its classifier keeps its head elsewhere than in `score`"
    try:
        check_model(model, family)
    except ValueError as error:
        return f"no: {_reason(error, model)}"
    return "served"


def _reason(error: ValueError, model: PreTrainedModel) -> str:
    """Return the fault that an error names, without the model's name before it and the remedy after it."""
    said = " ".join(str(error).split()).replace("|", "/").removeprefix(": ")
    return re.split(r", so it cannot|\. (?:Use|Set) ", said.split(f"{type(model).__name__} ", 1)[-1])[0].removesuffix(
        "."
    )


def _short(error: Exception) -> str:
    said = " ".join(str(error).split()).replace("|", "/")
    return f"{type(error).__name__}: {said}"[:160]


def table() -> str:
    """Return the text of the table of all families that the installed transformers has."""
    lines = [row(family) for family in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)]
    return HEADER.format(version=transformers.__version__) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
