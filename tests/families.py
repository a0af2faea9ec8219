"""Tiny random models of the decoder families in transformers, with whatever their configs can switch set to other than
the default."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


LAYERS, HIDDEN, VOCABULARY = 3, 32, 96
SIZES = {
    LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers",
    HIDDEN: "hidden_size n_embd d_model dim emb_dim embedding_size embedding_dim attention_hidden_size lru_width",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts sliding_window window_size attention_chunk_size linear_num_value_heads attention_window",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk moe_k top_k_experts n_group topk_group "
    "linear_num_key_heads",
    1: "n_shared_experts num_shared_experts num_kv_shared_layers num_nextn_predict_layers moe_num_shared_experts",
    8: "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim kv_channels global_head_dim hidden_size_per_layer_input "
    "linear_key_head_dim linear_value_head_dim mamba_d_head d_head swa_head_dim index_head_dim",
    16: "q_lora_rank kv_lora_rank word_embed_proj_dim mamba_d_state state_size ssm_state_size mamba_head_dim",
    48: "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim moe_intermediate_size ffn_hidden_size "
    "shared_expert_intermediate_size intermediate_size_mlp expert_ffn_hidden_size block_ff_dim dense_intermediate_size "
    "shared_intermediate_size",
    64: "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length context_length",
    VOCABULARY: "vocab_size vocab_size_per_layer_input decoder_vocab_size",
}
SWITCHES = {
    0.2: "initializer_range init_std",
    0.1: "dropout attention_dropout activation_dropout hidden_dropout resid_pdrop attn_pdrop embd_pdrop "
    "hidden_dropout_prob attention_probs_dropout_prob embedding_dropout layerdrop decoder_layerdrop resid_dropout "
    "attn_dropout embed_dropout residual_dropout router_jitter_noise input_jitter_noise dropout_rate",
    3.0: "final_logit_softcapping logits_scaling logits_soft_cap output_logit_soft_cap",
    5.0: "attn_logit_softcapping",
    0.3: "logit_scale attention_multiplier lm_head_multiplier",
    2.0: "embedding_multiplier scale_emb",
    0.5: "residual_multiplier scale_depth key_multiplier ssm_in_multiplier attention_in_multiplier",
    True: "use_sliding_window scale_embedding",
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}


def tiny_config(model_type: str, **changes) -> PreTrainedConfig:
    """Return a small config of a family, with switches set; `changes` come last."""
    config_class = type(AutoConfig.for_model(model_type))
    default = config_class()
    text = default.get_text_config(decoder=True)
    if text is not default:
        config_class, default = type(text), text
    known = default.to_dict()
    wanted = {name: value for table in (SIZES, SWITCHES) for value, names in table.items() for name in names.split()}
    wanted |= SPECIAL
    if "tie_word_embeddings" in known:
        wanted["tie_word_embeddings"] = not known["tie_word_embeddings"]
    return config_class(**{name: value for name, value in wanted.items() if name in known} | changes)


def tiny_model(model_type: str, **changes) -> PreTrainedModel:
    """Return a random model of a family, in evaluation mode."""
    torch.manual_seed(0)
    config = tiny_config(model_type, **changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").requires_grad_(False).eval()
