"""Check on the model itself, with a few tokens, that it can play all roles.

Families differ in the operations after the head (soft caps, scales), in how they count positions, in what their layers need,
and in what is random during training. A list of family names would soon be out of date, so each model is tested:

- `own_logits` computes logits from last hidden states as the model's own forward does, with all operations after its head;
- `check_model` refuses a model whose own forward differs from what the roles compute;
- `switch_off_dropout` switches off what is random in training, and `check_dropout_is_off` checks that nothing is left.
"""

import inspect
import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel


Mask = Bool[Tensor, "B S"] | Int[Tensor, "B S"]  # True or 1 on real tokens
LONG, SHORT = 12, 8  # tokens of the two texts that a model is checked on; the long one begins with the short one
DRAWN = 3  # tokens that are drawn after each text
# Weights of adapters and heads are mostly below 1; value heads of some millions have been seen. A larger one has diverged.
LARGEST_WEIGHT = 1e8
RANDOM = re.compile(r"drop|jitter")  # names of attributes with which modules act at random in training


# ----------------------------------------------------------------------------------------------- after the head
class _Given:
    """Stand-in for a part of a model that has run: a call returns the output; attributes are those of the part."""

    def __init__(self, part: nn.Module, output: Any):
        self._part, self._output = part, output

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._part, name)
        return _Given(value, self._output) if isinstance(value, nn.Module) else value

    def __call__(self, *args, **kwargs) -> Any:
        return self._output


class _Hidden(tuple):
    """Output of the decoder: its last hidden states, and None for any other attribute that `forward` may read."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


class _Decoded:
    """A language model whose decoder has run; the forward of its class, called on this, does the rest."""

    def __init__(self, model: PreTrainedModel, hidden: Tensor):
        self._model, self._hidden = model, hidden

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._model, name)
        return _Given(value, _Hidden((self._hidden,))) if value is self._model.base_model else value


def own_logits(model: PreTrainedModel, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
    """Return the logits that the model's own forward computes from last hidden states.

    The forward of its class runs with these states in place of the decoder. So all operations before and after the head
    (transforms, soft caps, scales) are the model's own.
    """
    hidden = hidden.unsqueeze(0)
    # Some families read the shape of these "inputs".
    return type(model).forward(_Decoded(model, hidden), inputs_embeds=hidden, use_cache=False).logits.squeeze(0)


@torch.no_grad()
def head_is_all(model: PreTrainedModel) -> bool:
    """Tell whether the head alone computes the model's logits from its last hidden states.

    The head and `own_logits` are compared to the bit on states of several sizes: a soft cap shows only in large logits.
    """
    if model.device.type == "meta":  # it has no values to compare
        return True
    head = model.get_output_embeddings()
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([0.1, 1.0, 10.0, 100.0]).repeat_interleave(2).unsqueeze(1)
    states = torch.randn(len(sizes), head.weight.shape[-1], generator=generator) * sizes
    states = states.to(head.weight.device, head.weight.dtype)
    return torch.equal(own_logits(model, states), head(states.unsqueeze(0)).squeeze(0))


# ----------------------------------------------------------------------------------------------- positions
def attention(model: PreTrainedModel, attention_mask: Mask) -> dict[str, Tensor]:
    """Return the inputs that tell the decoder about padding: the mask, and positions if it takes them."""
    inputs = {"attention_mask": attention_mask}
    if takes_positions(type(model.base_model)):  # type: ignore[arg-type]  # mypy holds that classes have no hash
        inputs["position_ids"] = positions(attention_mask)
    return inputs


@cache
def takes_positions(model_class: type[nn.Module]) -> bool:
    """Tell whether the forward of a class takes positions; alibi and recurrent models take none."""
    return "position_ids" in inspect.signature(model_class.forward).parameters


def positions(attention_mask: Mask) -> Int[Tensor, "B S"]:
    """Return the position of each token among the real ones of its row."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


# ----------------------------------------------------------------------------------------------- checks
@torch.no_grad()
def check_model(model: PreTrainedModel, source: str) -> None:
    """Check on two short texts that the roles compute what the model's own forward computes.

    The short text is the beginning of the long one. The last logits of a language model, or the score of a classifier, are
    computed for each text alone. They are compared with those of one batch of the long text and the short text, which is
    read inside the long one, padded at the left, and padded at the right. A language model also continues both texts in
    one batch with a cache, as in sampling.

    Args:
        source: the model's name, for errors.

    Raises:
        ValueError: the model sees later tokens; padding or its cache changes its outputs; its last hidden states do not
            give its logits or scores; or a part of it has the name of a role.
    """
    classifies = hasattr(model, "score")
    ids, mask = probe(model)
    try:
        own = {n: model(input_ids=ids[:1, :n], use_cache=False).logits[0] for n in (LONG, SHORT)}
        hidden = model.base_model(input_ids=ids, **attention(model, mask), use_cache=False).last_hidden_state
        last = torch.stack([hidden[0, LONG - 1], hidden[0, SHORT - 1], hidden[1, -1], hidden[2, SHORT - 1]])
        found = model.score(last) if classifies else own_logits(model, last)
        drawn = () if classifies else list(_drawn(model, ids[:2], mask[:2]))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise _refusal(
            model, source, f"does not run as the roles need it ({type(error).__name__}: {reason})"
        ) from error
    if not classifies and hidden.shape[-1] != model.get_output_embeddings().weight.shape[1]:
        raise _refusal(model, source, "projects its last hidden states before the head, but scores are read from them")
    kind = "scores" if classifies else "logits"
    faults = (
        (LONG, f"has {kind} that differ from those of its last hidden states"),
        (SHORT, "sees tokens that come later, as encoders do"),
        (SHORT, "lets padding at the left change what it says"),
        (SHORT, "lets padding at the right change what it says"),
    )
    if not all_finite([*own.values(), *found]):
        raise _refusal(model, source, f"gives {kind} that are not finite, so its weights are too large or damaged")
    exact = model.dtype in (torch.float32, torch.float64)
    if not classifies and not _agree(own[LONG][SHORT - 1], own[SHORT][-1], exact=exact):
        raise _refusal(model, source, "sees tokens that come later, as encoders do")
    for ours, (length, fault) in zip(found, faults, strict=True):
        theirs = own[length] if classifies else own[length][-1]
        if not _agree(ours, theirs, exact=exact):
            raise _refusal(model, source, fault)
    for ours, theirs in drawn:
        if not _agree(ours, theirs, exact=exact):
            raise _refusal(
                model, source, "draws tokens from other logits (with its cache) than it gives to the whole text"
            )
    named = {part for name, _ in model.named_modules() for part in name.split(".")}
    if taken := sorted(named & {"value", "reward", "ref", "default"}):
        raise _refusal(model, source, f"has parts named {taken[0]!r}, which is the name of a role's adapter")


def _drawn(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Continue texts (B, S), padded at the left, with the likeliest tokens, and yield two logits (V) for each token.

    The first are those of `generate`, the second those of the model's forward on the whole text alone.
    """
    options = {"max_new_tokens": DRAWN, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    greedy = GenerationConfig(
        **options, pad_token_id=model.config.get_text_config().pad_token_id, disable_compile=True
    )
    own, model.generation_config = model.generation_config, GenerationConfig()  # its own would fill in unset fields
    try:
        found = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy, synced_gpus=False)
    finally:
        model.generation_config = own
    for row, real, logits in zip(found.sequences, mask.bool(), torch.stack(found.logits, dim=1), strict=True):
        text = torch.cat([row[: len(real)][real], row[len(real) :]])
        yield from zip(
            logits, model(input_ids=text.unsqueeze(0), use_cache=False).logits[0, -DRAWN - 1 : -1], strict=True
        )


def _refusal(model: PreTrainedModel, source: str, fault: str) -> ValueError:
    return ValueError(
        f"{source}: {type(model).__name__} {fault}, so it cannot be the backbone. Use a decoder-only language model "
        f"(GPT-2, Llama, Qwen, Mistral ...)."
    )


def probe(model: PreTrainedModel) -> tuple[Int[Tensor, "3 S"], Int[Tensor, "3 S"]]:
    """Return ids and mask of a text, and of its beginning padded at the left and at the right.

    Its tokens are ordinary ones, because tokens that a config names have a special meaning.
    """
    config = model.config.get_text_config()
    values = [v for part in (model.config, config) for name, v in part.to_dict().items() if "token_id" in name]
    named = {i for value in values for i in (value if isinstance(value, list) else [value])}
    rows = min(model.get_input_embeddings().weight.shape[0], 4 * LONG + 64)
    ordinary = [i for i in range(rows) if i not in named]
    text = [ordinary[(7 * i + 3) % len(ordinary)] for i in range(LONG)]
    short, pad_id = text[:SHORT], config.pad_token_id or 0
    padding, gap = [pad_id] * (LONG - SHORT), [0] * (LONG - SHORT)
    ids = [text, padding + short, short + padding]
    mask = [[1] * LONG, gap + [1] * SHORT, [1] * SHORT + gap]
    return torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device)


def _agree(ours: Tensor, own: Tensor, *, exact: bool) -> bool:
    """Tell whether two vectors of logits, or two scores, are equal up to rounding (mean difference, in nats)."""
    ours, own = ours.float(), own.float()
    if len(own) > 1:
        ours, own = ours.log_softmax(dim=-1), own.log_softmax(dim=-1)
    return (ours - own).abs().mean().item() <= (1e-3 if exact else 0.25)


# ----------------------------------------------------------------------------------------------- dropout
@torch.no_grad()
def switch_off_dropout(model: nn.Module) -> None:
    """Switch off all dropout of a model.

    TRL switches off only `nn.Dropout`. Many models keep a probability in a module or in their config, and call dropout as a
    function. Layer drop and router jitter work in the same way. Only the config in memory changes, and no file.
    """
    configs: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if RANDOM.search(name) and type(value) is float:
                setattr(module, name, 0.0)
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "get_text_config"):
            configs |= {id(part): part for part in (config, config.get_text_config())}
    for config in configs.values():
        for name, value in list(vars(config).items()):
            if RANDOM.search(name) and type(value) is float:
                setattr(config, name, 0.0)


def without_dropout(model: PreTrainedModel, source: str) -> None:
    """Switch off all dropout of a model, and check that nothing random is left.

    Raises the errors of `check_dropout_is_off`.
    """
    switch_off_dropout(model)
    check_dropout_is_off(model, source)


@torch.no_grad()
def check_dropout_is_off(model: PreTrainedModel, source: str) -> None:
    """Check that two passes in training mode agree; the mode and the random state stay unchanged.

    Raises:
        ValueError: the two passes differ.
    """
    ids, was_training = probe(model)[0][:1], model.training
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        model.train()
        first, second = (model.base_model(input_ids=ids, use_cache=False).last_hidden_state for _ in range(2))
        model.train(was_training)
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{source}: disable_dropout=True leaves something random in {type(model).__name__}: two passes in training mode "
            f"differ. Set the model's dropout and noise to 0 in config.json."
        )


def all_finite(tensors: Iterable[Tensor], largest: float | None = None) -> bool:
    """Tell whether all values are finite, and at most `largest`; of a sharded tensor, only this process's part is read."""
    local = (x.to_local() if isinstance(x, DTensor) else x for x in map(Tensor.detach, tensors))
    return all(bool((x.isfinite() if largest is None else x.float().abs() <= largest).all()) for x in local)


def check_finite(model: nn.Module, name: str) -> None:
    """Check that the weights of a pretrained model are finite; weights in 4 bits always are.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    for key, weight in model.named_parameters():
        if weight.is_floating_point() and not all_finite([weight]):
            raise ValueError(
                f"{name}: {key} holds values that are not finite (NaN or infinity). Such a model can neither be trained nor "
                f"sampled from. Download or save the model anew."
            )
