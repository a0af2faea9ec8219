import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from trl import ModelConfig
from trl.trainer.utils import pad

from pipeline.backbone.adapters import HEAD, WEIGHTS, read_adapter
from pipeline.backbone.identity import fingerprint
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.roles import ADAPTERS, SWITCHES, Backbone
from pipeline.rl.losses import text_loss
from tests.backbone_copies import backbone_copies


TEXTS = ["A film of wit", "It's dull", "One of the best, and the funniest, of the year"]


def padded(tokenizer, side):
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side=side)
    return batch["input_ids"], batch["attention_mask"]


def test_roles_give_what_plain_peft_gives(backbone, tokenizer, sft_adapter, reward_adapter):
    ids, mask = padded(tokenizer, "right")
    policy = AutoPeftModelForCausalLM.from_pretrained(sft_adapter).eval()
    reward = AutoPeftModelForSequenceClassification.from_pretrained(reward_adapter, num_labels=1).eval()
    reward.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        expected = policy(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)[:, :-1]
        expected = expected.gather(-1, ids[:, 1:, None]).squeeze(-1)
        logprobs = backbone.logprobs("policy", ids, mask, ids[:, 1:])
        torch.testing.assert_close(logprobs[mask[:, 1:].bool()], expected[mask[:, 1:].bool()], atol=1e-5, rtol=0)
        scores = reward(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
        assert scores.std() > 1e-3
        torch.testing.assert_close(backbone.scores(ids, mask), scores, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_fresh_score_head(tiny):
    """32 hidden units: 30 heads of N(0, 1/33), without a bias; their deviation within four standard errors."""
    torch.manual_seed(0)
    heads = [load_pretrained(ModelConfig(tiny), head=True)[0].score for _ in range(30)]
    weights = torch.cat([head.weight for head in heads])
    error = 33**-0.5 / (2 * weights.numel()) ** 0.5
    assert weights.std().item() == pytest.approx(33**-0.5, abs=4 * error)
    assert weights.mean().abs().item() < 4 * 33**-0.5 / weights.numel() ** 0.5
    assert all(head.bias is None for head in heads)


def test_the_bare_backbone_is_the_base_model(backbone, tokenizer, tiny):
    ids, mask = padded(tokenizer, "right")
    base = GPT2LMHeadModel.from_pretrained(tiny).eval()
    with torch.no_grad():
        real = mask.bool()
        hidden = backbone.hidden_states(None, ids, mask)[real]
        torch.testing.assert_close(hidden, base.transformer(ids, attention_mask=mask).last_hidden_state[real])
        assert (hidden - backbone.hidden_states("policy", ids, mask)[real]).abs().max() > 1e-2


def test_left_and_right_padding_agree(backbone, tokenizer):
    right, right_mask = padded(tokenizer, "right")
    left, left_mask = padded(tokenizer, "left")
    with torch.no_grad():
        for role in ("policy", "reward", "value", None):
            a = backbone.hidden_states(role, right, right_mask)[right_mask.bool()]
            b = backbone.hidden_states(role, left, left_mask)[left_mask.bool()]
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_the_language_model_counts_real_tokens_as_generation_does(backbone, tokenizer):
    """What TRL's trainers call: unlike GPT-2's own, its logprobs of a completion do not depend on the prompt's padding."""
    right, right_mask = padded(tokenizer, "right")
    left, left_mask = padded(tokenizer, "left")
    with torch.no_grad():
        a = backbone(input_ids=right, attention_mask=right_mask).logits[right_mask.bool()]
        b = backbone(input_ids=left, attention_mask=left_mask).logits[left_mask.bool()]
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_one_row_equals_the_same_row_in_a_batch(backbone, tokenizer):
    ids, mask = padded(tokenizer, "right")
    with torch.no_grad():
        together = backbone.scores(ids, mask)
        alone = [backbone.scores(ids[i : i + 1, :n], mask[i : i + 1, :n]) for i, n in enumerate(mask.sum(dim=1))]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_temperature_divides_the_logits(backbone, tokenizer):
    ids, mask = padded(tokenizer, "right")
    with torch.no_grad():
        cold = backbone.logprobs("policy", ids, mask, ids[:, 1:], temperature=0.5)
        hidden = backbone.hidden_states("policy", ids, mask)[:, :-1]
        logits = backbone.get_base_model().lm_head(hidden) * 2  # divided by 0.5
    torch.testing.assert_close(cold, logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1))


def test_values_start_as_scores(backbone, tokenizer):
    ids, mask = padded(tokenizer, "right")
    with torch.no_grad():
        values = backbone.values(
            ids, mask, ids.shape[1] - 1
        )  # the value before token t reads the state of token t - 1
        rows = torch.tensor([i for i, n in enumerate(mask.sum(dim=1)) if n < ids.shape[1]])
        last = mask.sum(dim=1)[rows] - 1
        torch.testing.assert_close(values[rows, last], backbone.scores(ids, mask)[rows], atol=1e-5, rtol=0)


def gradients(backbone):
    return {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}


def test_both_roles_of_one_forward_get_the_gradients_of_separate_passes(backbone, tokenizer):
    ids, mask = padded(tokenizer, "left")
    completion = ids[:, -3:]
    logprobs, _, values = backbone(ids, mask, completion_ids=completion)
    (logprobs.sum() + 2 * values.sum()).backward()
    together = gradients(backbone)
    backbone.zero_grad()
    backbone.logprobs("policy", ids, mask, completion).sum().backward()
    (2 * backbone.values(ids, mask, 3).sum()).backward()
    apart = gradients(backbone)
    assert together.keys() == apart.keys()
    assert {name for name, p in backbone.named_parameters() if p.requires_grad} == together.keys()
    for name, gradient in together.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, apart[name])


def test_a_policy_gradient_equals_finite_differences(backbone, tokenizer):
    backbone.double()
    ids, mask = padded(tokenizer, "left")
    name, weight = next((n, p) for n, p in backbone.named_parameters() if "lora_B.default" in n)

    def objective():
        logprobs, _, values = backbone(ids, mask, completion_ids=ids[:, -3:])
        return logprobs.sum() + values.sum()

    objective().backward()
    step = 1e-6
    with torch.no_grad():
        weight[0, 0] += step
        above = objective()
        weight[0, 0] -= 2 * step
        below = objective()
    assert weight.grad[0, 0].item() == pytest.approx(((above - below) / (2 * step)).item(), rel=1e-6), name


def test_only_policy_and_value_train(backbone):
    trainable = {name for name, p in backbone.named_parameters() if p.requires_grad}
    expected = {n for n, _ in backbone.named_parameters() if "lora_" in n and (".default." in n or ".value." in n)}
    assert trainable == expected | {"heads.value.weight"}
    assert any(".default." in name for name in expected) and any(".value." in name for name in expected)


def test_a_role_is_left_as_it_was_entered_even_after_an_error(backbone):
    layers = [m for m in backbone.modules() if isinstance(m, BaseTunerLayer)]
    before = [[getattr(layer, name) for name in SWITCHES] for layer in layers]
    grads = [p.requires_grad for p in backbone.parameters()]
    with pytest.raises(RuntimeError), backbone.role("value"), backbone.role(None):
        assert all(layer._disable_adapters for layer in layers)
        raise RuntimeError
    assert [[getattr(layer, name) for name in SWITCHES] for layer in layers] == before
    assert [p.requires_grad for p in backbone.parameters()] == grads


def test_a_role_added_later_is_switched_on_layers_of_its_own(tiny):
    """The policy adapts attention alone, a role after it the MLP too: it must act as itself, and not when it is another's
    turn."""
    base = load_pretrained(ModelConfig(tiny))[0]
    backbone = Backbone(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)).eval()
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():
        before = backbone.hidden_states("policy", ids, mask)
        config = LoraConfig(
            task_type="CAUSAL_LM", target_modules=["c_fc"], fan_in_fan_out=True, init_lora_weights=False
        )
        backbone.add_adapter("other", config)
        assert (backbone.hidden_states("other", ids, mask) - before).abs().max() > 1e-3
        assert torch.equal(backbone.hidden_states("policy", ids, mask), before)


@pytest.mark.parametrize(("dora", "casts"), [(False, False), (True, True)])
def test_autocast_alone_casts_what_a_plain_lora_layer_multiplies(tiny, monkeypatch, dora, casts):
    """DoRA's norms want the adapter's precision. The numbers and gradients are those of peft's own cast, to the bit."""
    torch.manual_seed(0)
    base = load_pretrained(ModelConfig(tiny))[0].to(torch.bfloat16)
    options = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": False, "use_dora": dora}
    backbone = Backbone(base, LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.long)
    seen = []
    cast = BaseTunerLayer._cast_input_dtype

    def spy(self, x, dtype):
        found = cast(self, x, dtype)
        seen.append(found.dtype != x.dtype)
        return found

    def run(forward):
        backbone.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = forward()
        hidden.float().square().sum().backward()
        return hidden, [p.grad.clone() for p in backbone.role_parameters("policy")]

    positions = torch.arange(4)[None]
    model = backbone.get_base_model().base_model
    peft = run(lambda: model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state)
    monkeypatch.setattr(BaseTunerLayer, "_cast_input_dtype", spy)
    ours = run(lambda: backbone.hidden_states("policy", ids, mask))
    assert len(seen) == base.config.n_layer and all(found == casts for found in seen)
    assert torch.equal(ours[0], peft[0])
    assert all(gradient.abs().max() > 0 for gradient in ours[1])
    assert all(torch.equal(a, b) for a, b in zip(ours[1], peft[1], strict=True))


def test_a_role_that_there_is_not(backbone):
    with pytest.raises(
        ValueError, match="^role 'rewrad' is not known. The backbone's adapters are default, reward, value"
    ):
        backbone.scores(torch.tensor([[5]]), torch.ones(1, 1), role="rewrad")


@pytest.mark.parametrize("role", ["policy", "value", "reward"])
def test_a_saved_role_loads_with_plain_peft(backbone, tokenizer, tmp_path, role):
    backbone.save_role(role, tmp_path)
    ids, mask = padded(tokenizer, "right")
    with torch.no_grad():
        if role == "policy":
            model = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
            ours = backbone.hidden_states("policy", ids, mask)[mask.bool()]
            theirs = model.get_base_model().transformer(ids, attention_mask=mask).last_hidden_state[mask.bool()]
        else:
            model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).eval()
            model.config.pad_token_id = tokenizer.pad_token_id
            theirs = model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
            hidden = backbone.hidden_states(role, ids, mask)
            ours = backbone.heads[role](hidden).squeeze(-1)[torch.arange(len(ids)), mask.sum(dim=1) - 1]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_heads_keep_their_precision_on_a_bfloat16_base(tiny, sft_adapter, reward_adapter, tokenizer):
    base, _ = load_pretrained(ModelConfig(tiny, dtype="bfloat16"))
    backbone = Backbone(base, read_adapter(sft_adapter, base=base)).eval()
    backbone.add_role("reward", read_adapter(reward_adapter, needs_head=True, base=base))
    ids, mask = padded(tokenizer, "right")
    with torch.no_grad():
        plain = backbone.scores(ids, mask)
        with torch.autocast("cpu", torch.bfloat16):
            cast = backbone.scores(ids, mask)
    assert plain.dtype == cast.dtype == torch.float32
    torch.testing.assert_close(plain, cast, atol=0.2, rtol=0)


def test_a_fresh_policy_names_its_base(tiny, tmp_path):
    base, _ = load_pretrained(ModelConfig(tiny))
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    Backbone(base, config).save_role("policy", tmp_path)
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path).peft_config["default"].base_model_name_or_path == tiny


def test_save_pretrained_saves_the_policy_alone(backbone, tiny, tmp_path):
    """As TRL's trainers call it; `base_model_name_or_path` is where the base is now, not where it was."""
    backbone.save_role("policy", tmp_path / "role")
    backbone.save_pretrained(tmp_path / "saved")
    assert not any(path.is_dir() for path in (tmp_path / "saved").iterdir())
    ours, theirs = (load_file(tmp_path / folder / WEIGHTS) for folder in ("role", "saved"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["base_model_name_or_path"] == tiny
    backbone.save_pretrained(tmp_path / "two", selected_adapters=["default", "reward"])
    assert (tmp_path / "two" / "reward" / WEIGHTS).is_file()


@pytest.mark.slow
def test_the_process_holds_one_backbone_and_a_second_is_seen(backbone, tiny):
    others = backbone_copies(backbone)
    second, _ = load_pretrained(ModelConfig(tiny))
    assert backbone_copies(backbone) == pytest.approx(others + 1)
    second.itself = second  # a cycle, as of hooks
    del second
    with torch.device("meta"):
        planned = GPT2LMHeadModel(backbone.get_base_model().config)
    assert backbone_copies(backbone) == others and planned is not None


def test_the_fingerprint_tells_bases_apart_and_no_more(tiny, backbone):
    plain, _ = load_pretrained(ModelConfig(tiny))
    with_head, _ = load_pretrained(ModelConfig(tiny), head=True)
    half, _ = load_pretrained(ModelConfig(tiny, dtype="bfloat16"))
    ours = fingerprint(plain)
    assert ours == fingerprint(half) == fingerprint(backbone.get_base_model())
    assert ours.startswith(fingerprint(with_head) + "+")  # a score head is none of the language model's
    plain.transformer.h[1].mlp.c_fc.weight.data[0, 0] += 1
    assert fingerprint(plain) != ours


def test_a_reward_adapter_without_its_head_is_refused(reward_adapter, tmp_path):
    folder = Path(shutil.copytree(reward_adapter, tmp_path / "headless"))
    tensors = load_file(folder / WEIGHTS)
    del tensors[HEAD]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"headless: .* holds no score head .*modules_to_save"):
        read_adapter(str(folder), needs_head=True)


def test_an_adapter_of_another_base_is_refused(reward_adapter, tiny):
    base, _ = load_pretrained(ModelConfig(tiny))
    base.transformer.wte.weight.data[0] += 1
    with pytest.raises(ValueError, match="was trained on another base"):
        read_adapter(reward_adapter, needs_head=True, base=base)


def test_an_adapter_of_another_shape_is_refused(backbone, reward_adapter, tmp_path):
    folder = Path(shutil.copytree(reward_adapter, tmp_path / "cut"))
    tensors = load_file(folder / WEIGHTS)
    tensors.pop(next(name for name in tensors if "lora_A" in name))
    save_file(tensors, folder / WEIGHTS)
    backbone.delete_adapter(ADAPTERS["reward"])
    with pytest.raises(ValueError, match="1 tensors of the adapter do not match the backbone"):
        backbone.add_role("reward", read_adapter(str(folder), needs_head=True))


def test_missing_files_are_named(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^adapter '/': /adapter_config.json: no such file"):
        read_adapter("/")
    with pytest.raises(FileNotFoundError, match="adapter_config.json: no such file"):
        read_adapter(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load_pretrained(ModelConfig(str(tmp_path / "nowhere")))
    bare = Path(shutil.copytree(tiny, tmp_path / "bare"))
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="bare: the model folder has no tokenizer"):
        load_pretrained(ModelConfig(str(bare)))


def test_pickled_weights_are_not_loaded(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny, tmp_path / "pickled"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_pretrained(ModelConfig(str(folder)))


def test_the_identity_names_the_base(backbone, tiny, tmp_path):
    backbone.save_role("policy", tmp_path)
    record = json.loads((tmp_path / "backbone.json").read_text())
    made_for = {"model_name_or_path": tiny, "precision": "not quantised"}
    pad = backbone.get_base_model().config.pad_token_id
    assert record == {**made_for, "fingerprint": fingerprint(backbone.get_base_model()), "pad_token_id": pad}


# ------------------------------------------------------------------------------------------ padding and batches
def rows_of(count):
    """Token rows of 1 to 12 tokens."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(10, 4000, (1 + i % 12,), generator=generator) for i in range(count)]


def test_scores_do_not_depend_on_the_side_of_the_padding(backbone, tokenizer):
    scores = {}
    for side in ("left", "right"):
        ids = pad(rows_of(24), padding_value=tokenizer.pad_token_id, padding_side=side)
        with torch.no_grad():
            scores[side] = backbone.scores(ids, (ids != tokenizer.pad_token_id).long())
    assert scores["left"].std() > 0.01
    torch.testing.assert_close(scores["left"], scores["right"], atol=1e-5, rtol=0)


def test_a_batch_of_one_equals_the_same_row_among_64(backbone, tokenizer):
    """Log-probabilities and values of 3 completion tokens, and scores, of prompts padded at the left."""
    prompts, length = rows_of(64), 3
    completions = torch.stack(rows_of(12)[length - 1 : length] * 64) + torch.arange(64)[:, None]
    prompt_ids = pad(prompts, padding_value=tokenizer.pad_token_id, padding_side="left")
    mask = pad([torch.ones_like(row) for row in prompts], padding_value=0, padding_side="left")
    ids, mask = torch.cat([prompt_ids, completions], 1), torch.cat([mask, torch.ones_like(completions)], 1)
    with torch.no_grad():
        together = (
            backbone.logprobs("policy", ids, mask, completions),
            backbone.values(ids, mask, length),
            backbone.scores(ids, mask),
        )
        for i in (0, 11, 37, 63):
            row, chosen = torch.cat([prompts[i], completions[i]])[None], completions[i][None]
            everything = torch.ones_like(row)
            alone = (
                backbone.logprobs("policy", row, everything, chosen),
                backbone.values(row, everything, length),
                backbone.scores(row, everything),
            )
            for one, many in zip(alone, together, strict=True):
                torch.testing.assert_close(one[0], many[i], atol=1e-5, rtol=0)


def test_where_a_score_is_read_if_the_pad_token_is_the_end_of_text(backbone, tokenizer, reward_adapter):
    """At the last token that is not the pad token, as in transformers: the end-of-text token does not change it."""
    end = tokenizer.eos_token_id
    backbone.get_base_model().config.pad_token_id = end
    plain = AutoPeftModelForSequenceClassification.from_pretrained(reward_adapter, num_labels=1).eval()
    plain.config.pad_token_id = plain.get_base_model().config.pad_token_id = end
    ids = torch.tensor([[5, 6, 7, end, end], [8, 9, 10, 11, end], [5, 6, 7, 12, 13]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        scores = backbone.scores(ids, mask)
        theirs = plain(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
        without = backbone.scores(ids[:1, :3], mask[:1, :3])
    torch.testing.assert_close(scores, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores[:1], without, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # that they are saved is no harm
def test_an_adapter_of_the_output_head_belongs_to_its_role(tmp_path, tokenizer):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    base = LlamaForCausalLM(LlamaConfig(**shape, **special, vocab_size=len(tokenizer)))
    backbone = Backbone(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "lm_head"])).eval()
    backbone.add_value(init="policy")
    ids, mask = padded(tokenizer, "right")
    before = backbone.logprobs("reference", ids, mask, ids[:, 1:])
    for parameter in backbone.role_parameters("policy"):
        torch.nn.init.normal_(parameter)
    for role in ("reference", None):  # of no adapter: the bare backbone
        assert torch.equal(backbone.logprobs(role, ids, mask, ids[:, 1:]), before)
    policy = backbone.logprobs("policy", ids, mask, ids[:, 1:])
    assert (policy - before).abs().max() > 0.1
    with backbone.role("reference"):
        torch.testing.assert_close(backbone(ids, mask, completion_ids=ids[:, 1:])[0], policy)


# ------------------------------------------------------------------------------------------ the value role
@pytest.fixture
def roles(tiny, sft_adapter, reward_adapter):
    """Policy and, unless left out, reward on a tiny GPT-2; no value yet."""

    def roles(*, reward=True):
        base, _ = load_pretrained(ModelConfig(tiny))
        backbone = Backbone(base, read_adapter(sft_adapter, base=base)).eval()
        if reward:
            backbone.add_role("reward", read_adapter(reward_adapter, needs_head=True, base=base))
        return backbone

    return roles


def hidden_of(backbone, role):
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        return backbone.hidden_states(role, ids, torch.ones_like(ids))


@pytest.mark.parametrize(
    ("init", "reward", "origin"),
    [
        ("auto", True, "reward"),
        ("reward", True, "reward"),
        ("policy", True, "policy"),
        ("auto", False, "policy"),
        ("policy", False, "policy"),
    ],
)
def test_where_the_value_starts(roles, init, reward, origin):
    backbone = roles(reward=reward)
    backbone.add_value(init=init)
    assert torch.equal(hidden_of(backbone, "value"), hidden_of(backbone, origin))
    head = backbone.heads["value"].weight
    assert torch.equal(head, backbone.heads["reward"].weight if origin == "reward" else torch.zeros(1, 32))
    with torch.no_grad():  # a copy: the origin stays where it was
        for parameter in backbone.role_parameters("value"):
            parameter += 1
    assert not torch.equal(hidden_of(backbone, "value"), hidden_of(backbone, origin))
    assert origin == "policy" or not torch.equal(head, backbone.heads["reward"].weight)


def test_a_value_starts_as_the_weighted_reward(roles):
    backbone = roles()
    backbone.add_value(reward_weight=-0.5)
    assert torch.equal(backbone.heads["value"].weight, -0.5 * backbone.heads["reward"].weight)


def test_a_value_from_a_reward_that_there_is_not(roles):
    with pytest.raises(ValueError, match=r"value_init='reward' needs a reward adapter\. Name one in reward_adapter"):
        roles(reward=False).add_value(init="reward")


@pytest.mark.parametrize("reward", [True, False])
def test_a_value_that_is_only_a_head(roles, reward):
    backbone = roles(reward=reward)
    before = set(backbone.state_dict())
    backbone.add_value(critic="head")
    assert set(backbone.state_dict()) - before == {"heads.value.weight"}
    assert not backbone.heads["value"].weight.any()
    assert torch.equal(hidden_of(backbone, "value"), hidden_of(backbone, "policy"))


def test_gradients_of_a_value_that_is_only_a_head(roles):
    """It shapes the policy's hidden states, and one forward gives what two passes give."""
    backbone = roles()
    backbone.add_value(critic="head")
    backbone.heads["value"].weight.data.normal_(generator=torch.Generator().manual_seed(0))
    backbone.train_only("policy", "value")
    ids = torch.tensor([[5, 6, 7, 8]])
    everything = torch.ones_like(ids)
    _, _, values = backbone(ids, everything, completion_ids=ids[:, -2:])
    torch.testing.assert_close(values, backbone.values(ids, everything, 2))
    values.sum().backward()
    reached = {name for name, p in backbone.named_parameters() if p.grad is not None}
    assert reached == {n for n, _ in backbone.named_parameters() if ".default." in n} | {"heads.value.weight"}


@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_parameters_of_roles(roles, critic):
    backbone = roles()
    backbone.add_value(critic=critic)
    names = {id(p): name for name, p in backbone.named_parameters()}

    def of(*given):
        return {names[id(p)] for p in backbone.role_parameters(*given)}

    adapters = {role: {n for n in names.values() if f".{name}." in n} for role, name in ADAPTERS.items()}
    assert of("policy") == adapters["policy"] and len(adapters["policy"]) > 0
    assert of("reward") == adapters["reward"] | {"heads.reward.weight"}
    assert of("value") == adapters["policy" if critic == "head" else "value"] | {"heads.value.weight"}
    assert of("policy", "value") == of("policy") | of("value")


@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_roles_are_loaded_as_they_were_saved(roles, tmp_path, critic):
    trained = roles()
    trained.add_value(critic=critic)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.role_parameters("policy", "value"):
            parameter.normal_(generator=generator)
    for role in ("policy", "value"):
        trained.save_role(role, tmp_path / role)
    fresh = roles()
    fresh.add_value(critic=critic)
    for role in ("policy", "value"):
        fresh.load_role(role, read_adapter(str(tmp_path / role)))
    assert all(torch.equal(p, fresh.state_dict()[name]) for name, p in trained.state_dict().items())


def test_a_role_of_another_shape_is_not_loaded(backbone, reward_adapter, tmp_path):
    folder = Path(shutil.copytree(reward_adapter, tmp_path / "cut"))
    tensors = load_file(folder / WEIGHTS)
    tensors.pop(next(name for name in tensors if "lora_A" in name))
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ValueError, match="1 tensors of the adapter do not match the backbone"):
        backbone.load_role("value", read_adapter(str(folder)))


# ------------------------------------------------------------------------------------------ texts beside completions
def texts_of(tokenizer, filler=None):
    ids, mask = padded(tokenizer, "right")
    return ids if filler is None else ids.masked_fill(~mask.bool(), filler), mask.bool()


def test_texts_in_the_training_pass(backbone, tokenizer):
    ids, mask = padded(tokenizer, "left")
    given = {"input_ids": ids, "attention_mask": mask, "completion_ids": ids[:, -3:], "temperature": 0.7}
    texts, real = texts_of(tokenizer)
    *plain, of_texts = *backbone(**given), backbone.logprobs("policy", texts, real, texts[:, 1:])
    *together, found = backbone(**given, texts=(texts, real))
    for a, b in zip(together, plain, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(found, of_texts)  # at temperature 1: as a language model, not as a sampler
    loss = text_loss(found, real[:, 1:])
    loss.backward()
    changed = gradients(backbone)
    assert changed and all(".default." in name for name in changed)


def test_padding_of_texts_changes_no_loss_and_no_gradient(backbone, tokenizer):
    ids, mask = padded(tokenizer, "left")
    found = []
    for filler in (None, 17, tokenizer.eos_token_id):
        texts, real = texts_of(tokenizer, filler)
        *_, logprobs = backbone(ids, mask, completion_ids=ids[:, -3:], texts=(texts, real))
        backbone.zero_grad()
        loss = text_loss(logprobs, real[:, 1:])
        loss.backward()
        found.append((loss.detach(), gradients(backbone)))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0], atol=1e-6, rtol=0)
        for name, tensor in gradient.items():
            torch.testing.assert_close(tensor, found[0][1][name], atol=1e-6, rtol=1e-5)
