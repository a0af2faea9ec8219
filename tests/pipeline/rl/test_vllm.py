"""PPO that samples with vLLM: what TRL sends it, what comes back, and what becomes of it. vLLM itself is not here: behind
TRL's own code stands a plain transformers model, which knows the weights that it was sent and no others."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import PROMPTS
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient

from pipeline import ppo
from pipeline.backbone.roles import Backbone
from pipeline.rl.preflight import preflight
from pipeline.runs import opening
from pipeline.runs.command_line import parse


pytestmark = pytest.mark.slow


# ------------------------------------------------------------------------------------------ the policy as a plain model
SPECIAL = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "initializer_range": 0.2}
LLAMA = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"],
}


def make(folder, name: str, dtype=torch.float32, tie=False, **options) -> Backbone:
    """A backbone whose roles all differ, on a model that lies in the folder."""
    torch.manual_seed(0)
    if name == "gpt2":
        GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, **SPECIAL)).save_pretrained(folder)
    else:
        shape = {**LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": tie}
        LlamaForCausalLM(LlamaConfig(**shape, **SPECIAL)).save_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False)
    fresh = {"r": 4, "fan_in_fan_out": name == "gpt2", "init_lora_weights": False}
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": TARGETS[name], **fresh, **options})
    backbone = Backbone(base, config)
    backbone.add_value(init="policy")
    backbone.add_adapter("ref", config)
    with torch.no_grad():
        for parameter in backbone.role_parameters("value"):
            parameter += 1
    backbone.train_only("policy", "value")
    return backbone


def plain(backbone: Backbone, folder) -> torch.nn.Module:
    """The saved policy, merged by peft."""
    backbone.save_role("policy", folder)
    dtype = backbone.get_base_model().dtype
    return AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype).merge_and_unload()


def frozen(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in backbone.named_parameters() if "lora_" not in n and "heads" not in n}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {}),
        ("llama", {}),
        ("llama", {"tie": True}),
        ("gpt2", {"dtype": torch.bfloat16}),
        ("llama", {"dtype": torch.bfloat16}),
        ("gpt2", {"layers_to_transform": [1], "layers_pattern": "h"}),
        ("llama", {"use_dora": True}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # that they are saved is no harm
def test_what_is_sent_is_the_merged_policy_and_the_backbone_stays(name, options, tmp_path):
    backbone = make(tmp_path / "base", name, **options)
    before = frozen(backbone)
    places = {n: p.data_ptr() for n, p in backbone.named_parameters()}
    sent = list(backbone.merged_weights("policy"))
    with backbone.role("value"):  # whichever role is active
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(sent, backbone.merged_weights("policy"), strict=True))
    expected = dict(plain(backbone, tmp_path / "policy").named_parameters())  # tied weights once
    assert [name for name, _ in sent] == list(expected)
    for key, weight in sent:
        torch.testing.assert_close(weight, expected[key].data, atol=1e-6, rtol=0)
        assert not weight.requires_grad
    base = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "base").named_parameters())
    assert any(not torch.equal(weight.float(), base[key]) for key, weight in sent)
    after = frozen(backbone)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert {n: p.data_ptr() for n, p in backbone.named_parameters()} == places  # no copy stays
    assert not any(getattr(module, "merged", False) for module in backbone.modules())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {"target_modules": ["c_attn", "transformer.wte"]}),
        ("llama", {"target_modules": ["q_proj", "lm_head"], "tie": True}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # that they are saved is no harm
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # it is refused for that
def test_an_adapter_of_shared_weights_is_refused(name, options, tmp_path):
    backbone = make(tmp_path, name, **options)
    before = frozen(backbone)
    with pytest.raises(ValueError, match="changes (transformer.wte|lm_head), whose weights another layer shares"):
        list(backbone.merged_weights("policy"))
    after = frozen(backbone)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(getattr(module, "merged", False) for module in backbone.modules())


def test_merging_and_unmerging_as_peft_does_would_change_the_backbone(tmp_path):
    """Why `Backbone.merged_weights` is there."""
    backbone = make(tmp_path, "gpt2")
    before = frozen(backbone)
    backbone.merge_adapter()
    backbone.unmerge_adapter()
    assert any(not torch.equal(before[name], weight) for name, weight in frozen(backbone).items())


# ------------------------------------------------------------------------------------------ vLLM's place
class Engine:
    """A plain model in the place of vLLM, and a diary of what was asked of it."""

    def __init__(self, folder: str):
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.diary, self.received, self.asked = [], [], []
        self.deaf, self.answers = False, None

    def load(self, named: list) -> None:
        weights = {name: weight.clone() for name, weight in named}
        assert weights.keys() == dict(self.model.named_parameters()).keys()
        self.diary.append("sync")
        self.received.append(weights)
        if not self.deaf:
            self.model.load_state_dict(weights, strict=False)

    @torch.no_grad()
    def complete(self, prompts, *, n, temperature, top_k, top_p, min_p, repetition_penalty, max_tokens, **rest):
        """Tokens and their logprobs of each completion, those of a prompt following each other."""
        self.diary.append("generate")
        self.asked.append({"n": n, "temperature": temperature, "top_k": top_k, "top_p": top_p, "prompts": prompts})
        assert (min_p, repetition_penalty, rest["logprobs"]) == (0, 1, 0)
        if self.answers:
            return self.answers, [[0.0] * len(row) for row in self.answers]
        rows, logprobs = [], []
        for prompt in [prompt for prompt in prompts for _ in range(n)]:
            row = []
            while len(row) < max_tokens and not (row and row[-1] in rest["stop_token_ids"]):
                logits = self.model(torch.tensor([prompt + row])).logits[0, -1] / temperature
                of_row = logits.log_softmax(-1)
                row.append(torch.multinomial(of_row.exp(), 1).item())
                logprobs = logprobs if len(row) > 1 else [*logprobs, []]
                logprobs[-1].append(of_row[row[-1]].item())
            rows.append(row)
        return rows, logprobs


def server(engine: Engine):
    """TRL's client of a server, without the way there."""

    class Client:
        def __init__(self, base_url, group_port, connection_timeout):
            assert base_url == "http://there:8001"

        def init_communicator(self, device):
            pass

        def reset_prefix_cache(self):
            pass

        def update_named_params(self, metadata, named_params):
            named = [(name, weight.clone()) for name, weight in named_params]
            assert metadata == [(name, str(w.dtype).removeprefix("torch."), list(w.shape)) for name, w in named]
            engine.load(named)

        def generate(self, prompts, features, structured_outputs_regex, generation_kwargs, **options):
            rows, logprobs = engine.complete(prompts, **options, **generation_kwargs)
            logprobs = [[[of_token] for of_token in row] for row in logprobs]
            return {"prompt_ids": prompts, "completion_ids": rows, "logprobs": logprobs}

    assert set(vars(Client)) - {"__module__", "__dict__", "__weakref__", "__doc__"} <= set(dir(VLLMClient))
    return Client


def colocated(engine: Engine):
    """vLLM's LLM in this process; asleep it has no weights."""

    class LLM:
        def __init__(self, model, **options):
            assert model == engine.model.name_or_path
            self.weights = []
            self.llm_engine = SimpleNamespace(
                model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=SimpleNamespace(model=self)))
            )

        def load_weights(self, weights):
            self.weights += [(name, weight.clone()) for name, weight in weights]

        def reset_prefix_cache(self):
            engine.load(self.weights)
            self.weights = []

        def wake_up(self, tags):
            engine.diary.append(f"wake {tags[0]}")

        def sleep(self, level):
            engine.diary.append("sleep")

        def generate(self, prompts, sampling_params, use_tqdm):
            prompts = [prompt["prompt_token_ids"] for prompt in prompts]
            rows, logprobs = engine.complete(prompts, **sampling_params)
            return [
                SimpleNamespace(prompt_token_ids=prompt, outputs=[answer(row, of_row)])
                for prompt, row, of_row in zip(prompts, rows, logprobs, strict=True)
            ]

    def answer(row, of_row):
        known = [{token: SimpleNamespace(logprob=x, rank=7)} for token, x in zip(row, of_row, strict=True)]
        return SimpleNamespace(token_ids=row, logprobs=known)

    return LLM


@pytest.fixture
def engine(tiny, monkeypatch) -> Engine:
    engine = Engine(tiny)
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "VLLMClient", server(engine))
    monkeypatch.setattr(vllm_generation, "LLM", colocated(engine), raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", dict, raising=False)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # TRL sets them for vLLM: so they are put back after the test
        monkeypatch.delenv(name)
    return engine


SERVER = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://there:8001"}
COLOCATE = {"use_vllm": True, "vllm_mode": "colocate"}
ASLEEP = COLOCATE | {"vllm_enable_sleep_mode": True}


# ------------------------------------------------------------------------------------------ PPO
@pytest.mark.parametrize("options", [SERVER, COLOCATE, ASLEEP], ids=["server", "colocate", "sleep mode"])
def test_an_update_samples_from_the_weights_it_has(make_trainer, engine, tmp_path, options):
    trainer = make_trainer(**options, temperature=0.7)
    before = frozen(trainer.model)
    merged = []
    engine_load = engine.load
    engine.load = lambda named: (merged.append(plain(trainer.model, tmp_path / "now")), engine_load(named))
    trainer.train()

    update = ["sync", "generate"]
    if options is ASLEEP:
        update = ["wake weights", "sync", "wake kv_cache", "generate", "sleep"]
    assert engine.diary == (["sleep"] if options is ASLEEP else []) + 2 * update
    for received, expected in zip(engine.received, merged, strict=True):
        expected = dict(expected.named_parameters())
        assert received.keys() == expected.keys()
        for name, weight in received.items():
            torch.testing.assert_close(weight, expected[name].data, atol=1e-6, rtol=0)
    assert any(not torch.equal(engine.received[0][name], engine.received[1][name]) for name in engine.received[0])
    after = frozen(trainer.model)
    assert all(torch.equal(before[name], after[name]) for name in before)

    rows = [row for row in trainer.state.log_history if "approxkl" in row]
    firsts = [row for row in rows if "kl" in row]
    assert [row["step"] for row in firsts] == [1, 5] and len(rows) == 8
    assert all(row["approxkl"] == 0 and row["clipfrac/policy"] == 0 for row in firsts)  # the logprobs are our own
    assert all(row["approxkl"] > 0 for row in rows if "kl" not in row)
    assert firsts[0]["kl"] == 0 and firsts[1]["kl"] != 0
    for asked in engine.asked:
        assert (asked["n"], asked["temperature"], asked["top_k"], asked["top_p"]) == (1, 0.7, 0, 1)


def test_completions_of_a_prompt_are_asked_for_together(make_trainer, engine):
    trainer = make_trainer(**SERVER, num_generations=2)
    trainer.train()
    assert [(asked["n"], len(asked["prompts"])) for asked in engine.asked] == [(2, 4), (2, 4)]
    ids, mask = trainer._rollout.prompt_ids, trainer._rollout.prompt_mask
    prompts = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
    assert [row for row in engine.asked[-1]["prompts"] for _ in range(2)] == prompts


def test_where_a_completion_ends(make_trainer, engine, tokenizer):
    end = tokenizer.eos_token_id
    engine.answers = [
        [end],
        [5, 6, end],
        [5, 6, 7, 8, 9, 10],
        [5, end],
        [5] * 6,
        [6, 7, end],
        [5, 6, 7, 8, 9, end],
        [8, end],
    ]
    penalty = {"missing_eos_penalty": 3.0, "beta": 0.0, "gamma": 1.0, "lam": 1.0}
    trainer = make_trainer(reward_funcs=[ones], **SERVER, **penalty)
    trainer.model.train()
    rollout = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS])
    mask = rollout.completion_mask
    assert [ids[real].tolist() for ids, real in zip(rollout.completion_ids, mask, strict=True)] == engine.answers
    assert rollout.returns[:, 0].tolist() == pytest.approx([1, 1, -2, 1, -2, 1, 1, 1], abs=1e-5)
    assert trainer._metrics["train"]["completions/clipped_ratio"] == [2 / 8]
    assert trainer.vllm_generation.generation_kwargs["stop_token_ids"] == trainer.eos_token_ids == [end]


def ones(completions, **kwargs):
    return [1.0 for _ in completions]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"vllm_importance_sampling_correction": False}, None),
        ({"vllm_importance_sampling_mode": "token_truncate"}, [3.0, 1.0, 0.5]),
        (
            {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 8.0},
            [4.0, 1.0, 0.5],
        ),
        ({}, [2.0, 2.0, 2.0]),  # sequence_mask
        ({"vllm_importance_sampling_clip_max": 1.5}, [0.0, 0.0, 0.0]),
    ],
)
def test_a_wrong_sampler_is_corrected(make_trainer, engine, options, expected):
    """vLLM says of each completion's three tokens that they were a quarter, once and twice as likely as they are now."""
    trainer = make_trainer(**SERVER, **options, max_completion_length=3, num_iterations=1, max_steps=2)
    told = trainer.vllm_generation.generate

    def generate(**asked):
        prompts, rows, logprobs, ids = told(**asked)
        rows = [(row + [7, 8, 9])[:3] for row in rows]
        found = []
        for prompt, row in zip(asked["prompts"], rows, strict=True):
            ids_ = torch.tensor([prompt + row])
            ours = trainer.model.logprobs("policy", ids_, torch.ones_like(ids_), torch.tensor([row])).squeeze(0)
            found.append([[x] for x in (ours - torch.tensor([4.0, 1.0, 0.5]).log()).tolist()])
        return prompts, rows, found, ids

    trainer.vllm_generation.generate = generate
    trainer.train()
    rollout = trainer._rollout
    row = next(row for row in trainer.state.log_history if "kl" in row)
    assert row["sampling/sampling_logp_difference/max"] == pytest.approx(math.log(4), abs=1e-3)
    assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(5.5 / 3, abs=1e-3)
    assert row["approxkl"] == 0  # the ratio of PPO is that of the trained policy
    if expected is None:
        assert rollout.weights is None
        return
    weights = rollout.weights[:, :3]
    torch.testing.assert_close(weights, torch.tensor(expected).expand_as(weights), atol=1e-3, rtol=0)
    assert row["sampling/importance_weight/mean"] == pytest.approx(sum(expected) / 3, abs=1e-3)


@pytest.mark.parametrize("step", [2, 4])  # within an update, whose rollout is the checkpoint's, and between updates
def test_a_resumed_run_sends_its_weights_first(make_trainer, engine, tmp_path, step):
    options = SERVER | {"save_strategy": "steps", "save_steps": 2}
    make_trainer(**options).train()
    of_second_update = engine.received[1]
    engine.diary.clear()
    engine.received.clear()
    make_trainer(**options).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert engine.diary == ["sync", "generate"]
    assert all(torch.equal(weight, of_second_update[name]) for name, weight in engine.received[0].items())


def test_weights_that_were_loaded_are_sent_whatever_the_step(make_trainer, engine, tmp_path):
    trainer = make_trainer(**SERVER, held_out=PROMPTS[:2], per_device_eval_batch_size=2)
    trainer.save_model()
    trainer.evaluate()
    trainer.evaluate()
    trainer._load_from_checkpoint(str(tmp_path))
    trainer.evaluate()
    assert engine.diary == ["sync", "generate", "generate", "sync", "generate"]


# ------------------------------------------------------------------------------------------ before PPO
@pytest.mark.parametrize(
    ("spoil", "result"),
    [
        (lambda engine: None, "passed"),
        (lambda engine: setattr(engine, "deaf", True), "warning"),  # it keeps the bare backbone
        (lambda engine: setattr(engine, "answers", [[5, 6]] * 8), "warning"),  # with logprobs of 0
    ],
    ids=["sound", "deaf", "other logprobs"],
)
@pytest.mark.parametrize("options", [SERVER, COLOCATE], ids=["server", "colocate"])
def test_preflight_compares_what_vllm_says_it_sampled(make_trainer, engine, tokenizer, options, spoil, result):
    spoil(engine)
    trainer = make_trainer(**options, temperature=0.7)
    found = preflight(trainer.model, PROMPTS, tokenizer, trainer.args, vllm=trainer.vllm_generation)
    check = {check.name: check for check in found}["vLLM samples from the policy"]
    assert check.result == result and check.bound == "at most 0.1"
    assert check.measured < 1e-5 if result == "passed" else check.measured > 0.1
    trainer.train()  # and the first rollout has its own sync
    assert engine.diary == ["sync", "generate"] * 3


def test_logprobs_that_vllm_does_not_know_are_a_warning(make_trainer, engine, tokenizer):
    trainer = make_trainer(**SERVER)
    generate = trainer.vllm_generation.generate
    trainer.vllm_generation.generate = lambda **asked: (
        *generate(**asked)[:2],
        [[[None] for _ in row] for row in generate(**asked)[1]],
        None,
    )
    checks = preflight(trainer.model, PROMPTS, tokenizer, trainer.args, vllm=trainer.vllm_generation)
    check = {check.name: check for check in checks}["vLLM samples from the policy"]
    assert math.isnan(check.measured) and check.result == "warning"


STAGE = ppo.OPTIONS


def run_stage(tiny, tmp_path, **options):
    """The stage with vLLM, into `out`."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    given = {
        "model_name_or_path": tiny,
        "dataset_name": str(tmp_path / "prompts.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "reward_funcs": "tests.pipeline.rl.test_vllm.ones",
        "max_completion_length": 4,
        "max_steps": 2,
        "num_iterations": 1,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        **SERVER,
        **options,
    }
    ppo.main(*parse(*STAGE, args=[word for name, value in given.items() for word in (f"--{name}", str(value))]))


def test_the_stage(tiny, engine, sft_adapter, reward_adapter, tmp_path):
    run_stage(
        tiny,
        tmp_path,
        reward_funcs="reward_models.rules.sentiment",
        sft_adapter=sft_adapter,
        sample_updates=1,
        sample_prompts=2,
    )
    checks = json.loads((tmp_path / "out" / "metrics.json").read_text())["preflight"]
    assert [check["result"] for check in checks if check["name"] == "vLLM samples from the policy"] == ["passed"]
    assert (
        engine.diary == ["sync", "generate"] * 3
    )  # preflight and two updates: the table of samples asks the backbone
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 2 * 3


def test_the_stage_does_not_shard(tiny, engine, tmp_path, monkeypatch):
    def refuse(args, *, shards):
        raise ValueError(f"shards={shards}")

    monkeypatch.setattr(opening, "check_launch", refuse)
    for use_vllm in (True, False):
        with pytest.raises(ValueError, match=f"shards={not use_vllm}"):
            run_stage(tiny, tmp_path, use_vllm=use_vllm)
