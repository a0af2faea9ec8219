"""A table of completions to fixed prompts during training, which shows what curves do not."""

import asyncio
import json
from collections.abc import Coroutine
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from data.json_files import parse_json
from data.prompts import tokenize_prompts
from data.schemas import SAMPLE
from pipeline.backbone.sampling import as_answers, sample
from pipeline.rl.kl import kl_per_token
from pipeline.runs.live_files import SAMPLES, whole_lines
from pipeline.runs.training_log import write_anew
from reward_models.composite import Composite, call_rewards
from reward_models.ensembles import disagreement_in


class TrainerLoop(NamedTuple):
    """The event loop in which a trainer of TRL calls async rewards; the rewards' clients are bound to it."""

    trainer: Any

    def run(self, coroutine: Coroutine) -> list:
        return asyncio.run_coroutine_threadsafe(coroutine, self.trainer.async_loop).result()


class SampleTable(TrainerCallback):
    """Sample the same prompts with the same seed, before training and every `sample_updates` updates.

    Each row holds step, prompt, completion, score, KL (nats), how far an ensemble of reward models disagrees, if there is one,
    and what the judge says, if there is one. Rows are appended to
    `samples.jsonl` in the run's folder. They also go to the trackers that `report_to` names: as a table to trackio and
    wandb, as text to tensorboard. The state of the random generators is restored, so that training does not change.
    """

    def __init__(self, trainer, prompts: Dataset, judge: Composite | None = None):
        self.trainer, self.prompts, self.judge = trainer, prompts, judge
        self.path = Path(trainer.args.output_dir) / SAMPLES

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._keep_rows_of(state.global_step)
        if state.global_step == 0:
            self._add(0)

    def on_step_end(self, args, state, control, **kwargs):
        steps = self.trainer.steps_per_update // args.gradient_accumulation_steps * args.sample_updates
        if state.global_step % steps == 0:
            self._add(state.global_step)

    def _keep_rows_of(self, step: int) -> None:
        """Keep only the rows up to `step`, from which the run resumes: rows of later steps are written again."""
        kept = []
        for number, line in enumerate(whole_lines(self.path) if step else [], 1):
            if parse_json(line, f"{self.path} line {number}", SAMPLE, remedy="Delete the line.")["step"] <= step:
                kept.append(line)
        write_anew(self.path, kept)

    def _add(self, step: int) -> None:
        with self.trainer.gathered_weights():  # on all processes, since they may share the model
            rows = self._rows(step)
        if self.trainer.is_world_process_zero():
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
            self._report(step, pd.DataFrame(rows))

    def _report(self, step: int, table: pd.DataFrame) -> None:
        for name in ("trackio", "wandb"):
            if name in self.trainer.args.report_to:
                tracker = import_module(name)
                tracker.log({"samples": tracker.Table(dataframe=table)})
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer:
                callback.tb_writer.add_text("samples", table.to_html(index=False), step)

    @torch.no_grad()
    def _rows(self, step: int) -> list[dict]:
        trainer, args = self.trainer, self.trainer.args
        model = trainer.accelerator.unwrap_model(trainer.model)
        asked, was_training = self.prompts["prompt"][:], model.training
        model.eval()
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)
            (batch,) = sample(
                model,
                "policy",
                tokenize_prompts(asked, trainer.processing_class),
                trainer.processing_class,
                max_completion_length=args.max_completion_length,
                temperature=args.temperature,
                batch_size=len(asked),
            )
        inputs = (*batch[:3], args.temperature)
        policy, reference = (model.logprobs(role, *inputs) for role in ("policy", "reference"))
        kl = kl_per_token(policy, reference, batch.mask).sum(dim=1)
        texts = trainer.processing_class.batch_decode(batch.rows(), skip_special_tokens=True)
        completions = as_answers(texts, asked)
        figures = {"prompt": asked, "completion": texts, "score": None, "kl": kl.tolist()}
        for name, rewarding in (("score", trainer.composite), ("judge", self.judge)):
            if rewarding is not None:
                extra: dict[str, list] = {}
                given = (self.prompts, completions, batch.rows(), TrainerLoop(trainer), extra)
                figures[name] = rewarding.total(call_rewards(rewarding.functions, *given), asked, completions).tolist()
                if name == "score" and (found := disagreement_in(extra)):
                    figures["disagreement"] = found
        model.train(was_training)
        rows = zip(*figures.values(), strict=True)
        return [{"step": step, **dict(zip(figures, row, strict=True))} for row in rows]
