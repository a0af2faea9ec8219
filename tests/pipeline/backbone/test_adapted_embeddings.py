"""A policy that adapts the embeddings too: TRL's clone of it, the reference, is the same policy."""

from copy import deepcopy

import torch
from trl import ModelConfig

from pipeline.backbone.lora import LoraArguments
from pipeline.backbone.roles import load_backbone


def test_the_reference_starts_with_the_embeddings_of_the_policy(tiny, tokenizer):
    backbone, _ = load_backbone(ModelConfig(tiny, lora_r=4), None, lora=LoraArguments(lora_embeddings=True))
    torch.manual_seed(0)
    for name, parameter in backbone.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    backbone.add_adapter("ref", deepcopy(backbone.peft_config["default"]))
    for name, parameter in backbone.named_parameters():  # as TRL's trainers do
        if ".default." in name:
            backbone.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    backbone.eval()  # no dropout, in the layers of the new adapter either
    rows = tokenizer(["A film of wit and charm"], return_tensors="pt")
    given = rows["input_ids"], rows["attention_mask"].bool(), rows["input_ids"][:, -3:]
    with torch.no_grad():
        policy, reference, bare = (backbone.logprobs(role, *given) for role in ("policy", "reference", None))
    assert torch.equal(policy, reference)
    assert (policy - bare).abs().max() > 1e-3
