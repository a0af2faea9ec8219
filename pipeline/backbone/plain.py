"""Make the plain model of an adapter: its base with the adapter merged into the weights, as transformers saves a model."""

from copy import deepcopy
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from data.json_files import read_json
from data.schemas import IDENTITY
from pipeline.backbone.adapter_config import read_adapter_config
from pipeline.backbone.adapter_tensors import check_tensors, without_the_base
from pipeline.backbone.adapters import Adapter, check_adapter, load_tokenizer, read_adapter
from pipeline.backbone.architecture import probe
from pipeline.backbone.identity import IDENTITY as IDENTITY_FILE
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.merging import merged_weights


ADAPTER = "default"  # peft's name for the only adapter of a model
# How far the saved model may be from the adapter on its base, by the coarser precision of the two: rounding. The KL of their
# next tokens in nats, and the difference of a score. SmolLM2 in bfloat16 has a KL of 0.009 on prompts, and of 0.05 on `probe`.
BOUNDS = {torch.float32: (1e-5, 1e-4), torch.float16: (0.02, 0.1), torch.bfloat16: (0.2, 0.25)}


def base_of(name: str) -> str | None:
    """Return the base model that an adapter names. Raises the errors of `check_adapter`."""
    return read_adapter_config(name, check_adapter(name, needs_head=None))["base_model_name_or_path"]


def load_with_adapter(
    name: str, base_name: str, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Adapter, PreTrainedTokenizerBase]:
    """Load an adapter on its base, in the precision of the base's files, with the tokenizer that it was trained with.

    An adapter with a head is loaded on a sequence classifier with this head.

    Raises the errors of `check_adapter`, `load_pretrained` and `read_adapter`, and:
        ValueError: the adapter was trained on quantised weights.
    """
    folder = check_adapter(name, needs_head=None)
    identity = read_json(folder / IDENTITY_FILE, IDENTITY) if (folder / IDENTITY_FILE).is_file() else {}
    if (precision := identity.get("precision", "not quantised")) != "not quantised":
        raise ValueError(
            f"{name}: the adapter was trained on {precision} weights. The plain weights differ from them, so the merged model "
            f"would not be the one that was trained. Serve the adapter on its quantised base instead."
        )
    beside = None
    if (folder / "tokenizer.json").is_file():
        beside = load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    adapter = read_adapter(name)
    base, tokenizer = load_pretrained(
        ModelConfig(base_name, dtype="auto"),
        head=adapter.head is not None,
        trust_remote_code=trust_remote_code,
        pad_token=beside.pad_token if beside else None,
    )
    adapter = read_adapter(name, base=base, tokenizer=tokenizer)
    _attach(base, adapter)
    return base, adapter, beside or tokenizer


def _attach(base: PreTrainedModel, adapter: Adapter) -> None:
    """Add an adapter to a model, and its head if it has one."""
    config = deepcopy(adapter.config)
    config.modules_to_save, config.inference_mode = None, True
    with torch.random.fork_rng(devices=[]):  # peft draws weights, which the adapter's replace
        model = PeftModel(base, config, ADAPTER)
    weights = without_the_base(adapter.source, adapter.weights, base)
    own = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    shapes, needed = ({key: tuple(of.shape) for key, of in found.items()} for found in (weights, own))
    check_tensors(adapter.source, shapes, needed)
    set_peft_model_state_dict(model, weights, adapter_name=ADAPTER)
    if adapter.head is not None:
        base.score.weight.data.copy_(adapter.head)
    base.requires_grad_(False).eval()


def save_plain(
    base: PreTrainedModel, adapter: Adapter, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype
) -> float:
    """Save the plain model of `load_with_adapter` and its tokenizer, and return how far it is from the adapter on its base.

    Each weight is merged in float32 and rounded once, to `dtype`. The saved model is loaded again without peft, and both
    run on a few tokens. The result is the mean KL of the next token, in nats, or the difference of a score.

    Raises:
        ValueError: the difference is more than rounding.
    """
    expected, scores = _outputs(base), adapter.head is not None
    bound = max(BOUNDS[dtype][scores], BOUNDS[base.dtype][scores])
    weights = dict(merged_weights(base, ADAPTER, adapter.source, dtype=dtype, untie=True))
    ties = {name: kept for name, kept in base.all_tied_weights_keys.items() if {name, kept} <= weights.keys()}
    if all(torch.equal(weights[name], weights[kept]) for name, kept in ties.items()):
        for name in ties:
            del weights[name]
    else:  # the adapter changes one of two weights that the base shares
        base.config.get_text_config().tie_word_embeddings = base.config.tie_word_embeddings = False
    parameters = {name for name, _ in base.named_parameters(remove_duplicate=False)}
    weights |= {name: buffer for name, buffer in base.state_dict().items() if name not in parameters}
    base.to(dtype)  # which config.json names
    if base.can_generate():
        ends = base.generation_config.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        ends = list(dict.fromkeys([tokenizer.eos_token_id, *ends]))
        base.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    base.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    del weights
    saved = type(base).from_pretrained(folder, dtype=dtype, use_safetensors=True)
    difference = _difference(_outputs(saved), expected)
    if not difference <= bound:
        raise ValueError(
            f"{adapter.source}: the merged model differs from the adapter on its base by {difference:.3g} "
            f"({'in a score' if scores else 'KL, nats a token'}), and rounding explains at most {bound:g}. It is not saved. "
            f"Save it with --dtype float32, or serve the adapter itself."
        )
    return difference


@torch.no_grad()
def _outputs(model: PreTrainedModel) -> Tensor:
    """Return the logprobs of all tokens after each token of `probe`'s text, (S, V), or the score of the text, (1,)."""
    ids, mask = (part[:1] for part in probe(model))
    logits = model.eval()(input_ids=ids, attention_mask=mask).logits[0].float().cpu()
    return logits if logits.ndim == 1 else logits.log_softmax(dim=-1)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the KL of the next tokens, in nats, as a mean over the tokens of a text; or the difference of two scores."""
    if expected.ndim == 1:
        return (found - expected).abs().item()
    return (expected.exp() * (expected - found)).sum(dim=-1).mean().item()
