"""transformers' Trainer for distillation.

Optimizers, schedulers, trackers and DDP are Trainer's. What is here is what differs: the loss is a sum over the whole
optimizer step divided by the step's counted tokens; the teacher runs outside of the module that is trained; a
checkpoint holds a loadable student and counts only when it is complete; and what is logged are the single losses, and
tokens.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import AutocastKwargs, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, Trainer, TrainerControl, TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from distillkit.config import UserError
from distillkit.config.training_args import QUANTIZED_OPTIMIZERS
from distillkit.evaluation.divergence import Divergence
from distillkit.models.divided_rows import Context
from distillkit.models.labels import IGNORED_LABEL
from distillkit.runs import checkpoints
from distillkit.runs.clock import CHECKPOINTS, EVALUATION, Clock
from distillkit.runs.names import CHECKPOINT, COMPLETE
from distillkit.teacher.teacher import DISTRIBUTION, SignalRequest, Teacher, TeacherSignal
from distillkit.training.batches import WholeBatches
from distillkit.training.distiller import Distiller, DistillerOutput
from distillkit.training.divided_checkpoints import SHARDS, CheckpointWriter, check_shards
from distillkit.training.log_window import LogWindow
from distillkit.training.lora import save_adapter
from distillkit.training.optimizers import protect_updates
from distillkit.training.parallel import is_divided, shards, whole_state
from distillkit.training.rollouts import Rollouts
from distillkit.training.saving import save_student

PROJECTIONS = "projections.safetensors"
OPTIMIZER = "optimizer"
"""Folder of the parts of a divided optimizer, in a checkpoint."""


class DistillationTrainer(Trainer):
    """Trains `distiller.student` on the outputs of `teacher`.

    Args:
        distiller: the module to train.
        teacher: None where no loss needs one.
        request: what the teacher gives for each batch.
        weights_dtype: the dtype that saved students declare.
        divergence: measures the student, for `eval_strategy`; None without held-out text.
        context: the processes that share rows; None where each reads rows of its own.
        adapter: peft's model around the student, which checkpoints hold instead of it; None where weights are trained.
        async_checkpoints: those of a divided student are written while training goes on.
        rollouts: writes some of each step's rows with the student; None where all are of the dataset.
        clock: of the run, for evaluations and checkpoints; a new one by default.
        others: as for Trainer. Batches are those of `training.batches.Collator`.
    """

    model: Distiller
    control: TrainerControl

    def __init__(
        self,
        distiller: Distiller,
        teacher: Teacher | None,
        request: SignalRequest = DISTRIBUTION,
        *,
        weights_dtype: torch.dtype,
        divergence: Callable[[], Divergence] | None = None,
        context: Context | None = None,
        rollouts: Rollouts | None = None,
        adapter: Any = None,
        clock: Clock | None = None,
        async_checkpoints: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(model=distiller, **others)
        if is_divided(distiller):  # which reduces its own gradients, and must not be wrapped in DDP
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
            # Of each layer whose turn was, autocast would keep a bf16 copy of the weights that train.
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        self.remove_callback(PrinterCallback)
        self.teacher = teacher
        self.request = request
        self.weights_dtype = weights_dtype
        self.divergence = divergence
        self.context = context
        self.rollouts = rollouts
        self.adapter = adapter
        self.clock = clock or Clock()
        self.writer = CheckpointWriter(self.args, background=async_checkpoints and is_divided(distiller))
        self.accelerator.state.device_mesh = None if context is None else context.mesh  # the data loader's
        self._window = LogWindow()
        self._unread_tokens = torch.zeros((), dtype=torch.long)
        self._preference_pairs: dict[str, Tensor] = {}
        self._kept_signal: TeacherSignal | None = None
        self._step_batches: list[Any] = []
        self._coming: list[Any] = []
        self._coming_from: Iterator[Any] | None = None

    def get_train_dataloader(self) -> DataLoaderShard:
        """Trainer's, whose last batch is filled up with empty rows unless it is dropped."""
        loader = super().get_train_dataloader()
        if not self.args.dataloader_drop_last and self.args.train_sampling_strategy != "batch_rebalance":
            loader.set_sampler(WholeBatches(loader.get_sampler(), loader.total_batch_size))
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of an optimizer step, and the counted tokens of all of them on all ranks."""
        self.writer.poll()
        self._window.begin(self.state.num_input_tokens_seen)
        batches = self._next_batches(epoch_iterator, num_batches)
        if self.rollouts is not None and batches:
            batches = self._written_into(self.rollouts, batches)
        counts = [torch.stack([(batch["targets"] != IGNORED_LABEL).sum(), batch["lengths"].sum()]) for batch in batches]
        self._step_batches = batches
        counted, tokens = self.of_all_rows((torch.stack(counts).sum(0) if counts else torch.zeros(2)).to(device))
        self._preference_pairs = self._count_preference_pairs(batches)
        self._unread_tokens = self._unread_tokens + tokens
        return batches, counted

    def _next_batches(self, epoch_iterator: Iterator[Any], num_batches: int) -> list[Any]:
        """The micro-batches of the next step; the teacher hears of them, and of those of as many steps as it wants."""
        steps_ahead = 0 if self.teacher is None or self.rollouts is not None else self.teacher.steps_ahead
        if epoch_iterator is not self._coming_from:  # an epoch, or one that begins again with smaller batches
            self._coming, self._coming_from = [], epoch_iterator
        missing = num_batches * (1 + steps_ahead) - len(self._coming)
        self._coming += [batch for _, batch in zip(range(missing), epoch_iterator, strict=False)]
        if self.teacher is not None and self.rollouts is None:
            self.teacher.expect(self._coming)
        batches, self._coming = self._coming[:num_batches], self._coming[num_batches:]
        return batches

    def _written_into(self, rollouts: Rollouts, batches: list[Any]) -> list[Any]:
        """The micro-batches with rows that the student writes; the teacher hears of them."""
        batches, written = rollouts.write_into(batches, self.model.student, self.state.global_step)
        self._window.add_written(written)
        if self.teacher is not None:
            self.teacher.expect(batches)
        return batches

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss."""
        signal, self._kept_signal = self._kept_signal, None
        if signal is None and self.teacher is not None:
            signal = self.teacher.signal(inputs, self.request)
        output: DistillerOutput = model(
            **{name: inputs[name] for name in ("input_ids", "position_ids", "targets")},
            normalizer=num_items_in_batch,
            preference_pairs=self._preference_pairs,
            signal=signal,
        )
        self._window.add(output)
        # DDP averages the gradients of the ranks; these are parts of one sum.
        loss = output["loss"] * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def get_cp_size(self) -> int:
        """For Trainer's count of samples: processes that share rows."""
        return 1 if self.context is None else self.context.size

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not is_divided(model):
            super()._move_model_to_device(model, device)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """A micro-batch on this process's device, or its part of it."""
        inputs = super()._prepare_inputs(inputs)
        return inputs if self.context is None else self.context.part_of(inputs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimizer by name. Raises UserError where it needs a package that is not there."""
        try:
            return super().create_optimizer(model)
        except (ImportError, ValueError) as error:
            raise UserError("training_args.optim", f"{self.args.optim.value}: {error}") from error

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        """Trainer's optimizer by name, made such that it loses no small update of the parameters of `model`."""
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return protect_updates(args.optim, optimizer_class, options, trained)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay is for matrices: not for norms and biases (Trainer's rule), nor for vectors such as A_log."""
        vectors = {name for name, parameter in model.named_parameters() if parameter.dim() < 2}
        return [name for name in super().get_decay_parameter_names(model) if name not in vectors]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm, before the optimizer's step. Raises UserError where that step would wreck the weights.

        The error is the teacher's where its outputs are the reason.

        Optimizers that round stochastically may even make zeros of NaNs, which nobody would see.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if norm is not None and not math.isfinite(norm):
            if self.teacher is not None:
                for batch in map(self._prepare_inputs, self._step_batches):
                    self.teacher.check_outputs(batch, lambda here: gather_object([here]))
            raise UserError(
                "training_args.learning_rate",
                f"the gradient of step {self.state.global_step + 1} is {float(norm)}; the "
                "run has stopped before it reached the weights; lower it, and start again in another output_path",
            )
        return norm

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """The divergence from the teacher, as `eval_kl`, `eval_agreement`, …"""
        assert self.divergence is not None
        eager = torch.compiler.set_stance("force_eager")  # a compiled layer is for batches of the training's shape
        with self._window.paused(), self.clock.span(EVALUATION), eager:
            measured = self.divergence().as_metrics()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the single losses, tokens and tokens per second to what Trainer logs at a step."""
        self._read_tokens()
        if "loss" in logs:
            tokens = self.state.num_input_tokens_seen
            logs = {**logs, **self._window.close(tokens, self._over_ranks), "tokens": tokens}
        super().log(logs, start_time)

    def _read_tokens(self) -> None:
        """Bring the token counter up to date; only now and then, because it waits for the device."""
        self.state.num_input_tokens_seen += int(self._unread_tokens)
        self._unread_tokens = torch.zeros((), dtype=torch.long)

    def _over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, "sum")

    def of_all_rows(self, counts: Tensor) -> Tensor:
        """The sum of what each process counted in the rows that it has read, those that several read once."""
        return self._over_ranks(counts) // (1 if self.context is None else self.context.size)

    def _count_preference_pairs(self, batches: list[Any]) -> dict[str, Tensor]:
        """Ranking losses are divided by the preference pairs of the whole step, which depend on the teacher alone.

        The signal for a step of one micro-batch is kept for its loss; those of several would take too much memory.
        """
        objective = self.model.objective
        if not objective.ranking_terms or self.teacher is None:
            return {}
        totals: dict[str, Tensor] = {}
        for batch in map(self._prepare_inputs, batches):
            signal = self.teacher.signal(batch, self.request)
            self._kept_signal = signal if len(batches) == 1 else None
            for name, pairs in objective.preference_pairs(batch["targets"], signal.distribution).items():
                totals[name] = totals.get(name, torch.zeros_like(pairs)) + pairs
        return {name: self._over_ranks(pairs) for name, pairs in totals.items()}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's. When it returns or raises, no checkpoint is being written."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.writer.wait()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock.span(CHECKPOINTS):
            self.writer.settle()
        return super()._finalize_training(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's checkpoint, marked when complete; older ones are deleted after that, not before."""
        with self._window.paused(), self.clock.span(CHECKPOINTS):
            self.writer.settle()
        folder = Path(self.args.output_dir)
        path = folder / f"{CHECKPOINT}{self.state.global_step}"
        if (path / COMPLETE).exists():
            return
        begun = checkpoints.begin(path) if self.args.should_save else {}
        self.accelerator.wait_for_everyone()
        self._read_tokens()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        with self._window.paused(), self.clock.span(CHECKPOINTS):
            super()._save_checkpoint(model, trial)
            best = self.state.best_model_checkpoint

            def complete() -> None:
                checkpoints.mark_complete(path, begun)
                checkpoints.rotate(folder, limit, best)

            if self._writes_parts:
                self._write_parts(path, complete)
            else:
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    complete()
                self.accelerator.wait_for_everyone()
        self.args.save_total_limit = limit

    @property
    def _writes_parts(self) -> bool:
        """Whether each process writes its part of the optimizer."""
        return is_divided(self.model) and not self.args.save_only_model

    def _write_parts(self, path: Path, complete: Callable[[], None]) -> None:
        """Each process's part of the optimizer, then the student, which the main process has whole on the CPU."""
        student = whole_state(self.model)
        optimizer = get_optimizer_state_dict(self.model, self._own_optimizer())

        def finish() -> None:
            self._save(str(path), student)
            complete()

        self.writer.write(path / OPTIMIZER, {**optimizer, SHARDS: shards(self.model)}, finish)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`_save`, for which all processes gather a divided student, unless it is written with its optimizer."""
        if not self._writes_parts:
            self._save(output_dir, whole_state(self.model))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As Trainer, but for the optimizer of a divided student."""
        if not is_divided(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Those of a divided student load into one that is divided otherwise, or not at all.

        Raises `UserError` for one that was not divided and is now, and for blocks of numbers that would be divided.
        """
        parts = None if checkpoint is None else Path(checkpoint) / OPTIMIZER
        if parts is None or not parts.is_dir():
            if checkpoint is not None and is_divided(self.model):
                raise UserError("parallel", f"{checkpoint} was written without it; remove it to resume")
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if self.args.optim in QUANTIZED_OPTIMIZERS:
            check_shards(parts, shards(self.model), self.args.optim.value)
        optimizer = self._own_optimizer()
        state = get_optimizer_state_dict(self.model, optimizer)
        distributed_checkpoint.load(state, checkpoint_id=parts)
        set_optimizer_state_dict(self.model, optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(parts.with_name(SCHEDULER_NAME), weights_only=True))

    def _own_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer if isinstance(self.optimizer, AcceleratedOptimizer) else self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """A loadable student with its tokenizer; the projections, which are no part of it, beside it."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        everything = self.model.state_dict() if state_dict is None else state_dict
        student, projections = (
            {name.removeprefix(prefix): tensor for name, tensor in everything.items() if name.startswith(prefix)}
            for prefix in ("student.", "objective.")
        )
        if self.adapter is None:
            save_student(self.model.student, folder, self.weights_dtype, student)
        else:
            save_adapter(self.adapter, folder)
        if projections:
            save_file({name: tensor.contiguous() for name, tensor in projections.items()}, folder / PROJECTIONS)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The projections. The student was loaded from the checkpoint as any model is, before the trainer was made."""
        wanted = self.model.objective.state_dict()
        if not wanted:
            return
        path = Path(resume_from_checkpoint) / PROJECTIONS
        try:
            found = load_file(path)
            if found.keys() != wanted.keys():
                raise RuntimeError(f"it has {', '.join(found)}")
            set_model_state_dict(self.model.objective, {**found}, options=StateDictOptions(full_state_dict=True))
        except (OSError, SafetensorError, RuntimeError) as error:
            problem = " ".join(str(error).split())
            raise UserError("output_path", f"{path} does not hold the projections of this run: {problem}") from error
