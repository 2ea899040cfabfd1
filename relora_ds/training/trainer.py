"""One run, from a checked plan to an exported model. `Trainer.fit` reads from top to bottom."""

import contextlib
import json
import logging
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from relora_ds.checkpoint import store
from relora_ds.checkpoint.find import Found, ResumeError
from relora_ds.checkpoint.manifest import DamagedError, UnreadableError
from relora_ds.data.check_same_data import require_same_tokens
from relora_ds.exchange.arrivals import Stopped
from relora_ds.training import compatibility
from relora_ds.training.as_island import islands_of
from relora_ds.training.batches import train_batches
from relora_ds.training.clock import StepClock
from relora_ds.training.exit_codes import GuardError, Preempted
from relora_ds.training.figures import begin_peak_memory, figures_of, model_flops_per_token
from relora_ds.training.hooks.console import Console
from relora_ds.training.hooks.evaluation import Evaluations
from relora_ds.training.hooks.guard import Guard, RollBack
from relora_ds.training.hooks.hook import Hook, checked
from relora_ds.training.hooks.metrics import Metrics
from relora_ds.training.hooks.preemption import Preemption
from relora_ds.training.hooks.saving import Checkpoints
from relora_ds.training.hooks.step_traffic import Traffic
from relora_ds.training.hooks.tasks import TaskScores
from relora_ds.training.hooks.uploading import END_S, Uploads
from relora_ds.training.hooks.watchdog import Watching
from relora_ds.training.owned_directory import OwnedDirectory
from relora_ds.training.phases import WARM_START, Phase, build_engine, hand_over, phases_of
from relora_ds.training.preflight import Plan
from relora_ds.training.probe import drift_probe
from relora_ds.training.results import summary_of, write_results
from relora_ds.training.state import RunState
from relora_ds.training.step import take_step
from relora_ds.zero.engine import ReLoRAEngine
from relora_ds.zero.merging import NonFiniteMergeError
from relora_ds.zero.restore import problems, restore
from relora_ds.zero.start import init_distributed
from relora_ds.zero.teardown import release

logger = logging.getLogger(__name__)


class Trainer:
    """Trains one recipe: phases, in them steps, and around them hooks.

    Args:
        plan: what `preflight.check` returned.
        hooks: a user's, which hear of an event after the trainer's own.

    Attributes:
        run: where the run is.
        has_begun: whether the run directory was opened.

    Raises:
        RecipeError: one of `hooks` is none.
    """

    def __init__(self, plan: Plan, hooks: Iterable[Hook] = ()):
        recipe = plan.recipe
        self.directory = OwnedDirectory(recipe)
        self.watching = Watching(self.directory)
        self.uploads = Uploads(self.directory, self.watching.beat)
        self.checkpoints = Checkpoints(self.directory, self.uploads)
        self.evaluations = Evaluations()
        self.guard = Guard(recipe.guard, self.checkpoints)
        self.preemption = Preemption(self.checkpoints, self.uploads)
        self.run = RunState(
            plan,
            [
                self.watching,
                Traffic(),
                TaskScores(),
                Console(),
                Metrics(self.directory),
                self.guard,
                self.evaluations,
                self.uploads,
                self.checkpoints,
                *checked(hooks),
                self.preemption,
            ],
        )
        self.islands = islands_of(plan)
        self.has_begun = False

    def fit(self) -> dict[str, Any]:
        """Train to the end; returns what is in summary.json. Collective.

        Raises:
            Preempted: it was asked to stop, and has saved where it was; an island that waits for others has not.
            GuardError: it stops itself. ResumeError: it cannot resume from what was asked for.
        """
        try:
            checkpoint = self._start()
            while True:
                try:
                    return self._train_from(checkpoint)
                except RollBack as back:
                    checkpoint = self._go_back(back)
        except (GuardError, NonFiniteMergeError) as error:  # on every rank, after the same step
            self._leave()
            saved = store.directories(self.run.run_dir)
            raise GuardError(f"{error}. " + (f"Saved is {saved[-1]}" if saved else "Nothing was saved")) from error
        except Stopped as stopped:  # likewise
            self.preemption.note_stop()
            self._leave()
            saved = store.directories(self.run.run_dir)
            resumes = f"resumes from {saved[-1].name}" if saved else "begins anew"
            raise Preempted(f"{stopped}; resume=auto {resumes} and makes it good") from None
        except RuntimeError as error:
            if (explained := self.watching.explained(error)) is not error:
                raise explained from error
            raise
        finally:
            self._close()

    def set_status(self, state: str, reason: str = "", exit_code: int | None = None) -> None:
        """Replace status.json: rank 0, or whichever rank failed first. No-op until the run directory is open."""
        self.directory.set_status(self.run.step, state, reason, exit_code)

    def _train_from(self, checkpoint: Found | None) -> dict[str, Any]:
        run, phases, engine = self.run, phases_of(self.run.recipe), None
        if checkpoint is None:
            self._begin(None)
        else:
            # After the warm start it may be another method, which continues from a restart.
            phases = phases if checkpoint.manifest.run["phase"] == WARM_START else phases[-1:]
        for phase in phases:
            self._build(phase, checkpoint, engine)
            if checkpoint is not None:  # one that is refused leaves everything as it was
                self._begin(checkpoint)
            self._enter(phase)
            checkpoint, engine = None, run.engine
            while run.step < phase.stop:
                self._step()
        return self._finish()

    def _step(self) -> None:
        """Take a step, count it, and tell of it."""
        run = self.run
        with contextlib.ExitStack() as stack:
            for hook in reversed(run.hooks):  # the trainer's own are the inner ones
                stack.enter_context(hook.around_step(run))
            step = take_step(run)
        run.totals.tokens += run.recipe.tokens_per_step
        if step.applied:
            self._move_on(1)
            run.losses.add(step.loss)
            self._tell_of_restart(step.restarted)
            step.figures = figures_of(run, step)
        else:
            run.totals.skipped += 1
            run.totals.spikes += step.spike is not None
        run.emit(Hook.on_step, step)

    def _move_on(self, steps: int) -> None:
        """Take the engine's count of steps. Those beyond `steps` it did not take: it follows other islands."""
        run = self.run
        before, run.totals.step = run.totals.step, run.phase.start + run.engine.t
        if skipped := run.totals.step - before - steps:
            run.loader.skip(skipped)
        if run.engine.exchange is not None:
            for report in run.engine.exchange.take_reports():
                run.totals.tokens += report.made_good_steps * run.recipe.tokens_per_step
                run.emit(Hook.on_exchange, report)
                without = f"exchange {report.round} took place without {', '.join(report.missing)}"
                run.remarks["exchange"] = without if report.missing else ""
                self.set_status("running", run.remark)

    def _tell_of_restart(self, restarted: bool) -> None:
        if restarted:
            self.run.totals.restarts += 1
            self.run.emit(Hook.on_restart, self.run.engine.last_restart)

    # -- the run and its phases --------------------------------------------------------------------------------

    def _start(self) -> Found | None:
        """Start the process group, lock the run directory, find the checkpoint to resume from. Nothing is written."""
        plan = self.run.plan
        init_distributed()
        self.run.emit(Hook.on_start)
        require_same_tokens(plan.data.fingerprint, plan.data.sets)  # so every rank has looked at the directory
        self.directory.claim()
        self.uploads.claim(self.run)
        checkpoint = self.uploads.find(self.run)
        if checkpoint is not None:
            compatibility.require_same_run(checkpoint.manifest, plan)
        return checkpoint

    def _begin(self, checkpoint: Found | None) -> None:
        """Open the run directory; when resuming, roll it back to the checkpoint."""
        self.directory.open(self.run.plan, checkpoint)
        self.has_begun = True
        state = None if checkpoint is None else checkpoint.manifest.run["loader"]
        self.run.begin(train_batches(self.run.plan, state), checkpoint)
        self.run.emit(Hook.on_begin)
        self.set_status("running")

    def _build(self, phase: Phase, checkpoint: Found | None, engine: ReLoRAEngine | None) -> None:
        """Build the engine of a phase: from the one before it, from a checkpoint, or from nothing."""
        run = self.run
        self.watching.beat()
        handover = None
        if engine is not None:
            run.emit(Hook.on_phase_end)
            handover = hand_over(engine, run.plan, phase)
        run.engine = build_engine(run.plan, phase, handover, checkpoint is not None, self.islands)
        run.phase = phase
        run.resumed = None
        self.watching.watch(run.engine.module)
        if checkpoint is None:
            return
        if found := problems(checkpoint.manifest, run.engine):
            raise ResumeError(f"resume: {checkpoint.directory} does not fit: {'; '.join(found)}")
        try:
            restore(run.engine, checkpoint.directory, checkpoint.manifest)
        except (DamagedError, UnreadableError) as error:
            raise ResumeError(f"resume: {error}") from error

    def _enter(self, phase: Phase) -> None:
        """Begin to train and to measure with a new engine."""
        run, engine, recipe = self.run, self.run.engine, self.run.recipe
        begin_peak_memory(engine.device)  # else a phase would keep the peak of the one before
        engine.drift_probe = drift_probe(
            engine,
            run.plan.data.validation,
            seq_len=recipe.data.seq_len,
            micro_batch_size=recipe.train.micro_batch_size,
        )
        run.clock = StepClock(engine.device, run.totals)
        run.flops_per_token = model_flops_per_token(engine.module, recipe.data.seq_len)
        run.emit(Hook.on_phase)
        if engine.exchange is not None:
            engine.exchange.begin()
            self._move_on(0)
        elif run.resumed is not None:
            engine.restart_if_due()  # it was not where the run was shorter, or its calendar another
            self._tell_of_restart(engine.last_restart is not None)

    def _go_back(self, back: RollBack) -> Found:
        """Leave this engine for the newest checkpoint."""
        run = self.run
        run.emit(Hook.on_phase_end)
        release(run.engine)
        return self.guard.go_back(run, back.spike)

    def _finish(self) -> dict[str, Any]:
        """Export, summarise, say how it went. GuardError where the last state could not be saved."""
        run = self.run
        self.directory.claim()
        is_saved = self.checkpoints.secure(run)
        run.emit(Hook.on_phase_end)
        if not run.history or run.history[-1][0] != run.step:  # resumed at the very end
            self.evaluations.evaluate(run)
        summary = summary_of(run)
        write_results(run, summary)
        self.uploads.finish(run, END_S)
        run.emit(Hook.on_end, summary)
        if not is_saved:
            raise GuardError(
                f"the state after step {run.step} could not be saved; the model is in {run.run_dir / 'export'}"
            )
        self.set_status("done", run.remarks.get("upload", ""), exit_code=0)
        release(run.engine)
        dist.barrier()
        return json.loads(json.dumps(summary))

    def _leave(self) -> None:
        """Complete what is being written and uploaded, before an end that every rank comes to."""
        self.checkpoints.on_phase_end(self.run)
        self.uploads.finish(self.run, self.run.recipe.checkpoint.remote_stop_s)

    def _close(self) -> None:
        """Close all hooks, whatever one of them does, and free the run directory."""
        for hook in self.run.hooks:
            try:
                hook.close(self.run)
            except Exception as error:
                logger.warning("%s.close failed: %s", type(hook).__name__, error, exc_info=True)
        if self.islands is not None:
            self.islands.close()
        self.directory.close()
