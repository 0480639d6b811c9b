"""Trains on one rank: an engine, a stream of micro-batches, and one step after the other.

A step depends only on the recipe, the step's number and the state: learning rate and data are looked up by number,
never advanced, so a resumed run cannot differ from one that was never stopped.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

from smolconv.checkpoint import TrainingProgress
from smolconv.continual_pretraining.data.folders import open_folders, open_held_out
from smolconv.continual_pretraining.data.position import stages_of
from smolconv.continual_pretraining.data.stream import StepData, TrainingData, evaluation_batches
from smolconv.continual_pretraining.engine.attention import move
from smolconv.continual_pretraining.engine.config import TILE_TOKENS, engine_config, tiles_mlp
from smolconv.continual_pretraining.engine.model import build_model, check_no_leak
from smolconv.continual_pretraining.engine.optimizer import set_hyperparameters, set_learning_rate, torch_groups
from smolconv.continual_pretraining.engine.sequence import join_sequence_ranks
from smolconv.continual_pretraining.engine.tiling import tile_mlp
from smolconv.continual_pretraining.estimate.flops import FORMULA, flops_per_token
from smolconv.continual_pretraining.estimate.hardware import peak_flops
from smolconv.continual_pretraining.recipe.schedules import learning_rate
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.continual_pretraining.run.checkpoints import RunState, latest
from smolconv.continual_pretraining.run.control import Control
from smolconv.continual_pretraining.run.gate import check_first_loss
from smolconv.continual_pretraining.run.ranks import Ranks
from smolconv.continual_pretraining.run.saving import Background, Save, Saved, restore_random, save_run
from smolconv.continual_pretraining.run.start import StartPoint, first_micro_batch, groups_of
from smolconv.continual_pretraining.run.task_evaluation import TaskEvaluations
from smolconv.continual_pretraining.tokens.files import Batch, TokenFolder
from smolconv.continual_pretraining.watch.metrics import EventKind, StepRecord, Watch
from smolconv.continual_pretraining.watch.spikes import SpikeDetector
from smolconv.errors import MachineError, StoppedByRequest, StoppedBySignal, TrainingStopped, counted, first_line
from smolconv.layouts.deepspeed import patches
from smolconv.models.huggingface import spec_from_hf
from smolconv.models.spec import ModelSpec

#: How many micro-batches with a non-finite loss an error lists.
_NAMED_MICRO_BATCHES = 8
#: Shorter waits for the previous save are not reported.
_TOLD_WAIT_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class StepLoss:
    """The results of a step's micro-batches, over all ranks."""

    loss: float  #: mean of micro-batch means or mean over all targets, by loss.normalisation
    grad_norm: float  #: before clipping
    skipped: bool


class Asked(NamedTuple):
    """The requests that the ranks have agreed on."""

    stop: bool = False
    by_request: bool = False  #: by a request, perhaps also by a signal
    save: bool = False


class Trainer:
    """Lives as long as the engine. All ranks call all methods; rank 0 has a ``control``."""

    def __init__(
        self, recipe: Recipe, run: Path, start: StartPoint, ranks: Ranks, control: Control | None = None
    ) -> None:
        self.recipe, self.run, self.start, self.ranks, self.control = recipe, run, start, ranks, control
        self.spec: ModelSpec = spec_from_hf(dict(start.config))
        self.spikes = SpikeDetector(recipe.spikes)
        if start.spikes:
            self.spikes.restore(start.spikes)
        self.skipped_steps = start.skipped_steps
        self.stop_asked = 0
        self.saved_step: int | None = start.step if start.resumed else None  #: published
        self.background = Background() if recipe.checkpoints.asynchronous else None
        self.under_way: Save | None = None
        self.parts_ended = False  #: of the running save, on all ranks, as of the last step
        torch.manual_seed(recipe.seed)
        size = recipe.parallelism.sequence_ranks
        self.sequence = join_sequence_ranks(ranks.rank, ranks.world_size, size)
        #: Index among the groups of ranks that share micro-batches.
        self.data_rank, self.data_ranks = ranks.rank // size, ranks.world_size // size
        self.model = build_model(start.config, recipe.model, str(ranks.device), self.sequence)
        if tiles_mlp(recipe):
            patches.gather_whole(tile_mlp(self.model, TILE_TOKENS, compiled=recipe.model.compile))
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in start.frozen)
        self.groups = groups_of(recipe, self.spec, start.frozen)
        self.engine = self._engine()
        self._load()
        self.watch: Watch | None = None
        self.tasks: TaskEvaluations | None = None  #: on rank 0
        self.data: TrainingData | None = None
        self.held_out: Sequence[TokenFolder] = ()
        self.step_began = 0.0
        self.trained_step = start.step  #: the last completed one

    # --- the engine ---

    def _engine(self) -> Any:
        import deepspeed

        parameters = dict(self.model.named_parameters())
        given = self.recipe.optimizer
        optimizer = torch.optim.AdamW(
            torch_groups(self.groups, parameters), lr=0.0, betas=given.betas, eps=given.eps,
            # One kernel over a flat tensor: as fast as DeepSpeed's own Adams, which take minutes to compile.
            fused=True,
        )  # fmt: skip
        patches.stay_fused(optimizer)
        config = engine_config(self.recipe, self.ranks.world_size, torch.distributed.get_backend())
        engine, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=config)
        patches.replace_checkpoint_engine(engine)
        patches.scatter_gradients(engine)
        if self.ranks.world_size == 1:
            patches.reduce_nothing(engine)
        return engine

    def _load(self) -> None:
        path, _ = self.engine.load_checkpoint(
            self.start.folder, tag=self.start.tag, load_lr_scheduler_states=False, load_optimizer_states=True
        )
        if path is None:
            raise MachineError(f"DeepSpeed found nothing to load in {self.start.folder}, tag {self.start.tag}.")
        patches.set_progress(self.engine, self.start.step, self.recipe.global_batch_sequences)
        set_hyperparameters(self.engine.optimizer.param_groups, self.groups, self.recipe.optimizer)
        patches.keep_own_clipping(self.engine)
        if self.start.resumed:
            restore_random(Path(self.start.folder) / self.start.tag, self.ranks)

    @property
    def _clips_itself(self) -> bool:
        """ZeRO-0 in fp32: DeepSpeed then uses torch's optimizer, which neither clips nor skips."""
        return self.recipe.parallelism.zero_stage == 0 and self.recipe.model.dtype == "float32"

    # --- one micro-batch ---

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of the targets' losses, fp32; number of targets) of this rank's tokens."""
        device = self.ranks.device
        loss_sum, targets = self.engine(
            input_ids=move(torch.from_numpy(batch.input_ids), device),
            positions=torch.from_numpy(batch.positions),  # on the CPU, where the starts of documents are looked up
            labels=move(torch.from_numpy(batch.labels), device),
        )
        return loss_sum, targets

    def check_start(self) -> str | None:
        """Run the leak test and the start gate; returns messages. Raises ``TrainingStopped``."""
        said = None
        self.engine.eval()
        length = min(64, self.recipe.data.sequence_length)
        if self.recipe.data.mask_documents and length >= 4:
            check_no_leak(self.engine, self.spec.vocab_size, length, str(self.ranks.device), self.sequence)
        if self.start.gate is not None:
            batch = self.ranks.from_first(
                lambda: first_micro_batch(self.recipe, self.spec, self.start.step, self.start.position)
            )
            with torch.no_grad():
                loss_sum, targets = self.sequence.totals(*self._forward(batch))
            loss = loss_sum / max(targets, 1)
            check_first_loss(
                loss, int(targets), self.start.gate, dtype=self.recipe.model.dtype,
                tolerance=self.recipe.start.gate_tolerance,
            )  # fmt: skip
            said = f"start gate: first loss {loss:.6f}, the source model's {self.start.gate.loss:.6f}"
        self.engine.train()
        return said

    # --- the run ---

    def train(self) -> None:
        """Train all remaining steps. Raises ``TrainingStopped`` and ``StoppedBySignal``."""
        recipe, ranks, first = self.recipe, self.ranks, self.start.step + 1
        try:
            # Errors of the recipe first: opening the metrics drops the lines of steps that will be repeated.
            folders, self.held_out = ranks.from_first(self._open_data)
            self.data = TrainingData(
                recipe.data, global_batch_sequences=recipe.global_batch_sequences,
                micro_batch_sequences=recipe.parallelism.micro_batch_sequences, vocab_size=self.spec.vocab_size,
                rank=self.data_rank, world_size=self.data_ranks,
                position=self.start.position, folders=folders,
            )  # fmt: skip
            said = self.check_start()
            if ranks.first:
                self.watch = self._watch(first)
                if recipe.evaluation is not None and recipe.evaluation.tasks:
                    self.tasks = TaskEvaluations(recipe, self.run, self.watch)
                    self.tasks.go_on(self.start.step if self.start.resumed else 0)
            for text in filter(None, (*self.start.events, said)):
                self._say(text)
            with self._end_told():
                if self.control is None:
                    _listen(self)
                else:
                    self.control.enter("training", lambda: _listen(self))
                if self.held_out and self.start.resumed is None:
                    self._evaluate(self.start.step)  # the baseline
                self.step_began = time.perf_counter()
                self._steps(first)
            if recipe.evaluation is not None and recipe.evaluation.tasks:
                ranks.now_in("the tasks on the last checkpoint")
                ranks.from_first(self._finish_tasks)
        finally:
            if self.tasks is not None:
                self.tasks.close()
            if self.data is not None:
                self.data.close()
            if self.watch is not None:
                self.watch.close()

    @contextmanager
    def _end_told(self) -> Iterator[None]:
        """Train within the block; the end becomes an event."""
        began = time.perf_counter()

        def tell(kind: EventKind, text: str, **more: Any) -> None:
            steps, seconds = self.trained_step - self.start.step, time.perf_counter() - began
            told = f"{text}; {counted(steps, 'step')} in {seconds:.1f} s"
            self._say(told, step=self.trained_step, kind=kind, steps=steps, seconds=round(seconds, 3), **more)

        try:
            yield
        except StoppedBySignal as error:
            by = "request" if isinstance(error, StoppedByRequest) else "signal"
            tell("stopped", f"stopped by a {by}, and saved", reason=by)
            raise
        except Exception as error:
            told = f"{type(error).__name__}: {first_line(error)}"
            with suppress(MachineError, OSError):  # the disk itself may have failed
                tell("stopped", f"stopped by an error: {told}", reason="error", error=told)
            raise
        tell("finished", f"finished all {counted(self.recipe.schedule.train_steps, 'step')}")

    def _open_data(self) -> tuple[Mapping[str, TokenFolder], Sequence[TokenFolder]]:
        recipe, vocab_size = self.recipe, self.spec.vocab_size
        sources = [] if recipe.evaluation is None else recipe.evaluation.sources
        held_out = [open_held_out(source, recipe.data, vocab_size) for source in sources]
        return open_folders(recipe.data, self.start.position, vocab_size), held_out

    def _finish_tasks(self) -> None:
        assert self.tasks is not None
        self.tasks.finish(lambda: self.stop_asked > 0)

    def _steps(self, first: int) -> None:
        assert self.data is not None
        try:
            for step in self.data.steps(first, self.recipe.schedule.train_steps):
                self._step(step)
        except TrainingStopped:
            # On all ranks. The running save is of a good step, the newest.
            try:
                self.wait_for_save()
            except MachineError as error:
                self._say(str(error))
            raise
        if self.background is not None:
            self.background.close()

    def _step(self, data: StepData) -> None:
        recipe, step = self.recipe, data.step
        self.ranks.now_in(f"step {step}")
        lr = learning_rate(recipe.schedule, step - 1)
        set_learning_rate(self.engine.optimizer.param_groups, lr)
        found, asked = self._update(data)
        self.trained_step = step
        if self.watch is not None:
            seconds = time.perf_counter() - self.step_began  # includes waiting for data
            record = StepRecord(
                step=step, loss=found.loss, lr=lr, grad_norm=found.grad_norm, tokens=sum(data.tokens.values()),
                step_tokens=recipe.tokens_per_step, seconds=seconds, stage=data.stage, sources=data.tokens,
                skipped=found.skipped,
            )  # fmt: skip
            self.watch.step(record)
        if self.under_way is not None and self.parts_ended:
            self._go_on_saving(self.under_way, self.under_way.advance)
        if self.tasks is not None:
            self.tasks.look()
        evaluation = recipe.evaluation
        if evaluation and evaluation.every_steps and step % evaluation.every_steps == 0 and not asked.stop:
            asked = self._evaluate(step)._replace(save=asked.save)
        last = step == recipe.schedule.train_steps
        if asked.stop or asked.save or last or step % recipe.checkpoints.every_steps == 0:
            self._save(data, must=asked.stop or last)
        if asked.stop:
            error, by = (StoppedByRequest, "smolconv stop") if asked.by_request else (StoppedBySignal, "a signal")
            raise error(f"stopped by {by} after step {step}, which is saved. --resume auto continues from it.")
        self.step_began = time.perf_counter()

    def _update(self, data: StepData) -> tuple[StepLoss, Asked]:
        """Run forward, backward and the optimizer's step; also returns requests made to any rank."""
        by_tokens = self.recipe.loss.normalisation == "tokens"
        count = self.recipe.micro_batches_per_step
        scale = 1.0
        if by_tokens:
            own = sum(int((batch.labels >= 0).sum()) for batch in data.micro_batches)
            # DeepSpeed averages over micro-batches; this factor makes it the mean over the step's targets.
            scale = count / max(self.ranks.sums([own])[0] / self.sequence.size, 1.0)
        losses: list[torch.Tensor] = []
        asked, skip, mean = Asked(), False, math.nan
        for index, batch in enumerate(data.micro_batches):
            loss_sum, _ = self._forward(batch)
            # Targets of the whole micro-batch, which several ranks may share: the parts of its mean are summed.
            loss = loss_sum * scale if by_tokens else loss_sum / max(int((batch.labels >= 0).sum()), 1)
            losses.append(loss.detach())
            if index == len(data.micro_batches) - 1:
                # Before the last backward pass, which can still be cancelled.
                mean, asked = self._agree(data, losses, count)
                skip = self.spikes.is_spike(mean) and self.recipe.spikes.action == "skip"
                if self.spikes.is_spike(mean) and self.watch is not None:
                    done = "skipped" if skip else "kept"
                    self.watch.event(data.step, f"loss spike: {mean:.4f}, {done}", kind="spike")
            if skip:
                loss = loss * math.nan  # DeepSpeed skips steps with non-finite gradients
                # DeepSpeed averages over all ranks, as if each had its own micro-batch.
            self.engine.backward(loss * self.sequence.size)
            grad_norm = self._optimizer_step(index == len(data.micro_batches) - 1, skip)
        self.spikes.observe(mean)
        self.skipped_steps += skip
        if not skip and not math.isfinite(grad_norm):
            raise TrainingStopped(
                f"the gradients of step {data.step} are not finite, though its loss is {mean:.4f}. Weights are those "
                "before the step; nothing was saved after it. Check this step's data, or lower the learning rate."
            )
        return StepLoss(loss=mean, grad_norm=grad_norm, skipped=skip), asked

    def _agree(self, data: StepData, losses: Sequence[torch.Tensor], count: int) -> tuple[float, Asked]:
        """The step's loss over all ranks, and requests made to any rank, in one exchange.

        It also agrees on ``parts_ended``.
        """
        own = torch.stack(losses).double()
        saves = [] if self.control is None else self.control.take_saves()
        writes = self.under_way is not None and not self.under_way.part_ended()
        total, save, writing, *stop = self.ranks.sums(
            [float(own.sum()), float(len(saves)), float(writes), *self._stops()]
        )
        self.parts_ended = not writing
        if not math.isfinite(total):
            bad = [
                f"micro-batch {index * self.data_ranks + self.data_rank}: " + "; ".join(self._named(batch))
                for index, (batch, loss) in enumerate(zip(data.micro_batches, own.tolist()))
                if not math.isfinite(loss)
            ]
            named = list(dict.fromkeys(line for lines in self.ranks.everyone(bad) for line in lines))
            if len(named) > _NAMED_MICRO_BATCHES:
                named[_NAMED_MICRO_BATCHES:] = [f"and {len(named) - _NAMED_MICRO_BATCHES} more"]
            raise TrainingStopped(
                f"the loss of step {data.step} is not finite. It came from\n  " + "\n  ".join(named) + "\n"
                "This step changed nothing. Check these documents, or lower the learning rate."
            )
        if self.control is not None:
            self.control.answer(saves, data.step)
        return total / count, Asked(stop[0] > 0, stop[1] > 0, save > 0)

    def _stops(self) -> list[float]:
        """Whether this rank was asked to stop, and whether by a request."""
        requested = self.control is not None and self.control.stop_asked
        return [float(self.stop_asked > 0), float(self.stop_asked > 0 and requested)]

    def _named(self, batch: Batch) -> list[str]:
        """The positions of a batch's rows and documents in the token files."""
        assert self.data is not None
        return self.data.describe(batch)

    def _optimizer_step(self, last: bool, skip: bool) -> float:
        engine, norm = self.engine, math.nan
        if not (last and self._clips_itself):
            engine.step()
            if last:
                found = engine.get_global_grad_norm()
                norm = math.nan if found is None else float(found)
            return norm
        if skip:
            with patches.without_update(engine):
                engine.step()
            return norm
        limit = self.recipe.optimizer.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit if limit > 0 else math.inf))
        if math.isfinite(norm):
            engine.step()
        return norm

    def _evaluate(self, step: int) -> Asked:
        """The mean loss of every held-out source, and whether a rank was asked to stop meanwhile."""
        self.engine.eval()
        found: dict[str, float] = {}
        for folder in self.held_out:
            total, targets = 0.0, 0
            for batch in self._batches_of(folder):
                with torch.no_grad():
                    loss_sum, count = self._forward(batch)
                total, targets = total + float(loss_sum), targets + int(count)
                stop, by_request = self.ranks.sums(self._stops())
                if stop:
                    self.engine.train()
                    return Asked(True, by_request > 0)
            total, counted = self.ranks.sums([total, targets])
            found[folder.name] = total / max(counted, 1.0)
        self.engine.train()
        if self.watch is not None:
            self.watch.evaluation(step, found)
        return Asked()

    def _batches_of(self, folder: TokenFolder) -> Iterator[Batch]:
        assert self.recipe.evaluation is not None
        return evaluation_batches(
            folder, self.recipe.data, self.recipe.evaluation.sequences,
            self.recipe.parallelism.micro_batch_sequences, self.data_rank, self.data_ranks, self.spec.vocab_size,
        )  # fmt: skip

    # --- saving ---

    def _save(self, data: StepData, *, must: bool) -> None:
        """Save the step. ``must``: finish before returning, and fail on a full disk, whatever the recipe says."""
        self._wait_for_turn(data.step)
        given = self.recipe.parallelism
        state = RunState(
            step=data.step, position=data.position, zero_stage=given.zero_stage, world_size=self.ranks.world_size,
            dtype=self.recipe.model.dtype, micro_batch_sequences=given.micro_batch_sequences,
            global_batch_sequences=self.recipe.global_batch_sequences, spikes=self.spikes.state(),
            skipped_steps=self.skipped_steps, token_files=self.start.token_files,
            schedule=self.recipe.schedule.model_dump(mode="json"),
        )  # fmt: skip
        stages = stages_of(data.position)
        progress = TrainingProgress(
            step=data.step,
            consumed_samples=sum(stage.consumed_train_samples for stage in stages),
            consumed_tokens=sum(data.tokens.values()),
            stages=stages,
            last_stage_index=len(stages) - 1 if stages else None,
        )
        after = self.start.step if self.saved_step is None else self.saved_step
        # DeepSpeed's own count of samples assumes that every rank has its own micro-batch.
        patches.set_progress(self.engine, data.step, self.recipe.global_batch_sequences)
        self.under_way = save_run(
            self.engine, self.ranks, self.recipe, self.run, self.start, state, progress, after, self.background
        )
        if must or self.background is None:
            self.wait_for_save(must=must)

    def wait_for_save(self, *, must: bool = False) -> None:
        """Wait until no save is running. Raises ``MachineError`` if it failed, unless the recipe continues."""
        if self.under_way is not None:
            self._go_on_saving(self.under_way, self.under_way.finish, must=must)

    def _wait_for_turn(self, step: int) -> None:
        """Make sure that at most one save is running."""
        if (earlier := self.under_way) is None:
            return
        began = time.perf_counter()
        self.wait_for_save()
        if (seconds := time.perf_counter() - began) > _TOLD_WAIT_SECONDS:
            self._say(f"waited {seconds:.1f} s: step {earlier.step} was still being written", step=step)

    def _go_on_saving(self, save: Save, go_on: Callable[[], Saved | None], *, must: bool = False) -> None:
        began = time.perf_counter()
        try:
            saved = go_on()
        except MachineError as error:
            self.under_way = None
            if must or self.recipe.checkpoints.on_full_disk == "stop":
                raise
            text = f"{error} Training continues (checkpoints.on_full_disk: continue)."
            self._say(text, step=save.step, kind="save_failed")
            return
        save.stall_seconds += time.perf_counter() - began
        if saved is None:
            return
        self.under_way, self.saved_step = None, save.step
        stall = save.stall_seconds
        seconds = max(saved.seconds, stall)  # the ranks also have to tell each other
        told = f"saved {saved.folder} in {seconds:.1f} s"
        told += "" if self.background is None else f"; training stopped for {stall:.2f} s"
        self._say(
            told, step=save.step, kind="saved", stall_seconds=round(stall, 3), write_seconds=round(seconds, 3),
            bytes=saved.nbytes,
        )  # fmt: skip
        for text in saved.notes:
            self._say(text, step=save.step)
        if self.tasks is not None:
            self.tasks.saved(save.step)

    def weights(self) -> Mapping[str, torch.Tensor]:
        """The complete weights of the forward pass, on rank 0's CPU. All ranks must call it; others get nothing."""
        import deepspeed

        found = {}
        for name, parameter in self.model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                if self.ranks.first:
                    found[name] = parameter.detach().cpu().clone()
        return found

    # --- watching ---

    def _watch(self, first: int) -> Watch:
        record = None if self.control is None else self.control.record
        return Watch(
            self.run, self.recipe, first_step=first,
            flops_per_token=flops_per_token(self.spec, self.recipe.data.sequence_length),
            flops_formula=FORMULA, peak_flops=self._peak_flops(), resumed=self.start.resumed is not None,
            began=None if record is None else {
                "launcher": record.launcher, "job": record.job, "host": record.host, "ranks": record.ranks,
                "nodes": record.nodes,
            },
        )  # fmt: skip

    def _peak_flops(self) -> float | None:
        name = torch.cuda.get_device_name() if self.ranks.device.type == "cuda" else None
        one = peak_flops(name, self.recipe.logging.peak_tflops)
        return None if one is None else one * self.ranks.world_size

    def _say(self, text: str, step: int | None = None, kind: EventKind = "note", **more: Any) -> None:
        if self.watch is not None:
            self.watch.event(self.start.step if step is None else step, text, kind=kind, **more)


def _listen(trainer: Trainer) -> None:
    """Handle SIGTERM and SIGUSR1 by stopping after the step, once all ranks agree.

    The handlers stay until the process ends: a second signal must not kill a rank that is saving or has just saved. The
    export, which checks ``stop_asked`` once, has its own handlers (worker.py).
    """

    def ask(signum: int, frame: FrameType | None) -> None:
        trainer.stop_asked = signum

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, ask)


def newest_checkpoint(run: Path) -> Path:
    """The checkpoint to export. Raises ``MachineError`` if nothing was saved."""
    found = latest(run)
    if found is None:
        raise MachineError(f"{run} has no checkpoint to export.")
    return found
