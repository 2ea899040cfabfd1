"""One run, from a checked plan to an exported model. `fit` reads from top to bottom."""

import json
import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from relora_ds.checkpoint import store
from relora_ds.checkpoint.find import Found, ResumeError, find
from relora_ds.checkpoint.manifest import DamagedError, UnreadableError
from relora_ds.checkpoint.run_files import read_json
from relora_ds.checkpoint.sharing import find_peers
from relora_ds.data import tokenizer_files
from relora_ds.data.check_same_data import require_same_tokens
from relora_ds.interop.sources import TOKENIZER
from relora_ds.lowrank.wrap import count_parameters
from relora_ds.models.build import meta_model
from relora_ds.training import identity, report
from relora_ds.training.accounting import Account, StepTraffic
from relora_ds.training.batches import train_batches
from relora_ds.training.clock import StepClock
from relora_ds.training.console import View
from relora_ds.training.evaluation import evaluate, rehearse
from relora_ds.training.guard import BadSteps, GuardError, LossSpikes, RollBack, Spike
from relora_ds.training.journal import Journal
from relora_ds.training.phases import Phase, build_engine, hand_over, phases_of
from relora_ds.training.preemption import Preempted, StopRequest
from relora_ds.training.preflight import Plan
from relora_ds.training.probe import drift_probe
from relora_ds.training.results import write_results
from relora_ds.training.run_directory import Claim
from relora_ds.training.samples import draw_samples, first_documents
from relora_ds.training.watchdog import Watchdog
from relora_ds.utils.files import write_json, write_text
from relora_ds.zero.checkpoints import writer_of
from relora_ds.zero.restart import NonFiniteMergeError
from relora_ds.zero.restore import problems, restore
from relora_ds.zero.start import init_distributed
from relora_ds.zero.teardown import release
from relora_ds.zero.traffic import count_traffic

MAX_ROLLBACKS = 3  # to the same checkpoint


class Trainer:
    """Trains one recipe.

    Attributes:
        plan: what `preflight.check` returned.
        account: totals so far.
        journal: what it says and writes.
    """

    def __init__(self, plan: Plan):
        self.plan, self.recipe = plan, plan.recipe
        self.run_dir = Path(self.recipe.run_dir)
        self.account = Account()
        self.bad_steps = BadSteps(self.recipe.guard)
        # An evaluation's batches are no larger than those of training.
        self._batches = {"seq_len": self.recipe.data.seq_len, "micro_batch_size": self.recipe.train.micro_batch_size}
        self.engine = self.writer = self.sharing = self.journal = self.stop = self.watchdog = self._claim = None
        self._last_evaluated = self._last_saved = None
        self._rolled_back: list[tuple[int, int, Spike]] = []  # to which step, from which one, why
        self.is_first = self.is_open = False

    def fit(self) -> dict:
        """Train to the end; returns what is in summary.json. Collective.

        Raises:
            Preempted: it was asked to stop, and has saved where it was.
            GuardError: it stops itself. ResumeError: it cannot go on from what was asked for.
        """
        try:
            checkpoint = self._find_checkpoint()
            while True:
                try:
                    return self._train_from(checkpoint)
                except RollBack as back:
                    checkpoint = self._roll_back(back.spike)
        except (GuardError, NonFiniteMergeError) as error:  # on every rank, after the same step
            self._close_writer()
            saved = store.directories(self.run_dir)
            raise GuardError(f"{error}. " + (f"Saved is {saved[-1]}" if saved else "Nothing was saved")) from error
        except RuntimeError as error:
            # A rank that died says nothing itself. (NCCL's own thread ends the process, and nothing is raised.)
            if self.watchdog is not None and (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise RuntimeError(f"{error}; {self.watchdog.blame()}") from error
            raise
        finally:
            for part in (self.stop, self.watchdog, self._claim):
                if part is not None:
                    part.close()

    def _train_from(self, checkpoint: Found | None) -> dict:
        phases = phases_of(self.recipe)
        now = phases[0].name if checkpoint is None else checkpoint.manifest.run["phase"]
        first = [phase.name for phase in phases].index(now)
        if checkpoint is None:
            self._open_run(None)
        for phase in phases[first:]:
            self._build(phase, checkpoint)
            if checkpoint is not None:  # one that is refused leaves everything as it was
                self._open_run(checkpoint)
            self._enter(phase, checkpoint)
            checkpoint = None
            while self.account.step < phase.stop:
                self._train_step()
                if self.engine.was_step_applied():
                    self._evaluate_if_due()
                    self._checkpoint_if_due()
                self._take_finished_checkpoints()
                if self.stop.agreed():
                    self._save_and_stop()
        return self._finish()

    def set_status(self, state: str, reason: str = "", exit_code: int | None = None) -> None:
        """Replace status.json: rank 0, or whichever rank failed first. Nothing happens before the directory is ours."""
        path = self.run_dir / "status.json"
        if self.is_open and self._holds_run_dir() and (self.is_first or state == "failed"):
            if state == "failed" and read_json(path).get("state") == "failed":
                return  # what failed first is the reason, what follows from it is not
            try:
                write_json(
                    path,
                    {
                        "state": state,
                        "step": self.account.step,
                        "reason": reason,
                        "exit_code": exit_code,
                        "time": time.time(),
                    },
                )
            except OSError as error:  # a full disk is no reason to stop
                self.view.warn(f"status.json is not up to date: {error}")

    # -- the run and its phases --------------------------------------------------------------------------------

    def _find_checkpoint(self) -> Found | None:
        """Start the process group, lock the run directory, find the checkpoint to resume from. Nothing is written."""
        init_distributed()
        self.watchdog = Watchdog(
            self.recipe.guard.watchdog_seconds,
            lambda: f"step {self.account.step}",
            lambda message, code: self.set_status("failed", message, code),
        )
        self.is_first = dist.get_rank() == 0
        self.view = View(self.is_first, self.recipe.total_steps)
        require_same_tokens(self.plan.data.fingerprint)  # so every rank has looked at the directory and is here
        self._claim_run_dir()
        checkpoint = find(self.run_dir, self.recipe.resume)
        if checkpoint is not None:
            identity.require_same_run(checkpoint.manifest, self.plan)
        return checkpoint

    def _open_run(self, checkpoint: Found | None) -> None:
        """Begin to write the run directory; when resuming, roll it back to the checkpoint."""
        saved = checkpoint and checkpoint.manifest
        if self.is_first:
            if not self.is_open:
                self.is_open = True
                self.set_status("running")  # before the old run's files go: what is left is a run, and not an ended one
                self._claim.begin()
            (self.run_dir / "checkpoints").mkdir(exist_ok=True)
            tokenizer_files.save(self.plan.tokenizer, self.run_dir / "checkpoints" / TOKENIZER)  # for their export
            write_text(self.run_dir / "recipe.yaml", self.recipe.to_yaml())
            if checkpoint is not None:
                store.drop_after(self.run_dir, saved.step, checkpoint.damaged)
        dist.barrier()
        self.is_open = True
        if checkpoint is not None:
            self.account, self._last_saved = Account(**saved.run["account"]), saved.step
        data, recipe = self.plan.data, self.recipe
        self.loader = train_batches(self.plan, saved.run["loader"] if saved else None)
        self.spikes = LossSpikes(recipe.guard, saved.run["losses"] if saved else ())
        if self.stop is None:
            self.stop = StopRequest()
        self.journal = Journal(
            self.plan,
            self.view,
            self.account,
            self.spikes,
            resume_step=self.account.step if saved else -1,  # what left no checkpoint is forgotten
            may_write=self._holds_run_dir,
        )
        self.prompts = first_documents(data.validation, data.eos_id, recipe.eval.samples, recipe.data.seq_len)
        self.full_rank_elements = count_parameters(meta_model(self.plan.model_config))[0]
        for line in report.opening(self.plan, phases_of(recipe), checkpoint and self.account.step):
            self.view.line(line)
        for warning in (
            *self.plan.warnings(),
            *(checkpoint.passed_over if checkpoint else ()),
            *(identity.changes(saved, self.plan) if checkpoint else ()),
        ):
            self.view.warn(warning)
        self.set_status("running")

    def _claim_run_dir(self) -> None:
        """Lock the run directory on rank 0, again if it was moved. Collective.

        Raises:
            ResumeError: on every rank, where it cannot be this run's.
        """
        problem = [None]
        if self.is_first:
            try:
                if self._claim is None:
                    self._claim = Claim(self.recipe)
                else:
                    self._claim.renew()
            except (ValueError, OSError) as error:
                problem = [str(error)]
        dist.broadcast_object_list(problem)
        if problem[0]:
            self.is_open = False
            raise ResumeError(problem[0])

    def _holds_run_dir(self) -> bool:
        """Whether rank 0 may write there now: what has its name may be another run's, if ours was moved."""
        return self._claim is None or self._claim.is_held()

    def _build(self, phase: Phase, checkpoint: Found | None) -> None:
        """Build the engine of a phase: from the engine before it, from a checkpoint, or from nothing."""
        self.watchdog.beat()
        self._close_writer()
        handover = hand_over(self.engine, self.plan, phase) if self.engine is not None else None
        self.engine, self.phase = build_engine(self.plan, phase, handover, checkpoint is not None), phase
        self.watchdog.watch(self.engine.module)
        if checkpoint is not None:
            if found := problems(checkpoint.manifest, self.engine):
                raise ResumeError(f"resume: {checkpoint.directory} is of another network: {'; '.join(found)}")
            try:
                restore(self.engine, checkpoint.directory, checkpoint.manifest)
            except (DamagedError, UnreadableError) as error:
                raise ResumeError(f"resume: {error}") from error

    def _enter(self, phase: Phase, checkpoint: Found | None) -> None:
        """Begin to train and to measure with a new engine."""
        self.watchdog.beat()
        if self.sharing is None:  # once, while the disk has room
            self.sharing = find_peers(self.run_dir / "checkpoints")
        self.writer = writer_of(
            self.engine,
            self.run_dir / "checkpoints",
            self._prune_checkpoints,
            checkpoint and (checkpoint.directory, checkpoint.manifest),
            self.sharing,
        )
        report.begin_peak_memory(self.engine.device)  # else a phase would go on from the peak of the one before
        self.engine.drift_probe = drift_probe(self.engine, self.plan.data.validation, **self._batches)
        self.traffic = StepTraffic(self.engine, self.full_rank_elements)
        self.clock = StepClock(self.engine.device, self.account)
        self._last_evaluated, self._has_rehearsed = None, False
        self.journal.phase(self.engine, phase, self.traffic, self.clock)
        if checkpoint is not None:
            if self._rolled_back:
                self.journal.rollback(*self._rolled_back[-1][1:])
            self.engine.restart_if_due()  # it was not where the run was shorter, or its calendar another
            if self.engine.last_restart is not None:
                self.account.restarts += 1
                self.journal.restart()

    # -- the loop ----------------------------------------------------------------------------------------------

    def _train_step(self) -> None:
        """One optimizer step on the next batch: forward, backward, reduce, Adam and, if it is due, a restart."""
        engine, account = self.engine, self.account
        lr, restarts_before = engine.get_lr()[0], len(engine.restarts)
        sampling = self.traffic.wants_sample()
        loss, spike = torch.zeros((), dtype=torch.float64, device=engine.device), None
        with self.clock.step(sampling), count_traffic() if sampling else nullcontext() as sample:
            for micro_batch in self.loader.next_step(is_last=account.step + 1 >= self.recipe.total_steps):
                batch = {name: value.to(engine.device, non_blocking=True) for name, value in micro_batch.items()}
                micro_loss = engine(**batch).loss  # and nothing else of the output: its logits are large
                loss += micro_loss.detach().double() / self.plan.accumulation
                if self.spikes.screens and engine.is_gradient_accumulation_boundary():
                    spike = self._screen(loss)
                # A step with a spike goes the way of one that is not finite: no rank applies it, at any stage.
                engine.backward(micro_loss if spike is None else micro_loss * math.nan)
                engine.step()
        restarted = len(engine.restarts) > restarts_before
        self.traffic.record(sample, is_regular=engine.was_step_applied() and not restarted)
        account.count_step(self.recipe.tokens_per_step, self.traffic)
        if not engine.was_step_applied():
            account.skipped += 1
            self.journal.skipped_step(spike)
            self.bad_steps.record(applied=False)
            if spike and self.recipe.guard.on_spike == "rollback":
                self._take_finished_checkpoints(wait=True)
                if self._last_saved is not None:
                    raise RollBack(spike)
            return
        self.bad_steps.record(applied=True)
        account.step = self.phase.start + engine.t
        if restarted:
            account.restarts += 1
            self.journal.restart()
        self.journal.step(loss, lr)

    def _screen(self, loss: Tensor) -> Spike | None:
        """Judge a step's loss before its step is applied. Collective."""
        mean = loss.clone()
        dist.all_reduce(mean)
        spike = self.spikes.take(mean.item() / dist.get_world_size())
        self.account.spikes += spike is not None
        return spike

    def _evaluate_if_due(self) -> None:
        """At every multiple of `eval.every`, at the end of a cycle without one, and at the end of a phase."""
        step, every, restarts = self.account.step, self.recipe.eval.every, self.engine.restarts
        due = step == self.phase.stop or (every is not None and step % every == 0)
        if restarts and restarts[-1] == self.engine.t:  # a cycle has just ended
            began = self.phase.start + (restarts[-2] if len(restarts) > 1 else 0)
            due = due or every is None or step // every == began // every
        if not self._has_rehearsed:  # after the first step: now memory holds all that it will, and ZeRO-3 its trace
            self._has_rehearsed = True
            rehearse(self.engine, self.plan.data, **self._batches, device=self.engine.device)
        if not due or self._last_evaluated == step:
            return
        self._last_evaluated = step
        self.clock.drain()  # what the device still does is the step's
        result = evaluate(
            self.engine,
            self.plan.data,
            **self._batches,
            device=self.engine.device,
            max_tokens=None if step == self.phase.stop else self.recipe.eval.max_tokens,
        )
        samples = draw_samples(
            self.engine,
            self.plan.tokenizer,
            self.prompts,
            seq_len=self.recipe.data.seq_len,
            seed=self.recipe.seed,
            device=self.engine.device,
        )
        self.journal.evaluation(result, samples)

    def _checkpoint_if_due(self) -> None:
        step, settings = self.account.step, self.recipe.checkpoint
        if not (step == self.recipe.total_steps or (settings.every and step % settings.every == 0)):
            return
        self._save()

    def _save(self) -> None:
        self.clock.drain()
        self._claim_run_dir()
        self.journal.collect_losses()  # the window of losses is saved
        self.writer.save(
            self.account.step,
            {
                "phase": self.phase.name,
                "loader": self.loader.state_dict(),
                "account": self.account.state(),
                "losses": list(self.spikes.losses),
                **identity.of(self.plan),
            },
        )
        self.set_status("running")

    def _save_and_stop(self) -> None:
        """The run was asked to stop: save where it is, unless that has just been done."""
        step = self.account.step
        asked = f"asked to stop ({self.stop.heard})"
        if not self._is_saved():
            raise GuardError(f"{asked}, but the state after step {step} could not be saved")
        self._close_writer()
        raise Preempted(f"{asked}; saved after step {step}, go on with resume=auto")

    def _is_saved(self) -> bool:
        """Save the state as it is now, unless that has been done; once more if it fails. Collective."""
        for _ in range(2):
            self._take_finished_checkpoints(wait=True)
            if self._last_saved != self.account.step:
                self._save()
        self._take_finished_checkpoints(wait=True)
        return self._last_saved == self.account.step

    def _roll_back(self, spike: Spike) -> Found:
        """Leave this engine for the newest checkpoint. The data go on where they are, or the same spike would come."""
        self._close_writer()
        self.journal.close()
        release(self.engine)
        self.engine = None
        checkpoint = find(self.run_dir, "auto") or find(self.run_dir, self.recipe.resume)
        if checkpoint is None:
            raise GuardError("guard.on_spike: rollback, and no checkpoint could be written to go back to")
        step, run = checkpoint.manifest.step, checkpoint.manifest.run
        if [to for to, *_ in self._rolled_back].count(step) == MAX_ROLLBACKS:
            raise GuardError(
                f"guard.on_spike: {MAX_ROLLBACKS} times back to step {step}, and a loss spike each time, "
                "with other data; lower optim.lr"
            )
        self._rolled_back.append((step, self.account.step, spike))
        self.view.line(f"after step {self.account.step}: going back to step {step}, with the data that come next")
        run["loader"] = self.loader.state_dict()
        # What the steps that are taken back cost stays in the account.
        was = run["account"]
        run["account"] = self.account.state() | {
            "step": was["step"],
            "restarts": was["restarts"],
            "rollbacks": self.account.rollbacks + 1,
        }
        return checkpoint

    def _prune_checkpoints(self) -> None:
        settings = self.recipe.checkpoint
        store.prune(self.run_dir, settings.keep_last, settings.keep_every, self.sharing.is_here)

    def _close_writer(self) -> None:
        """Wait for the checkpoint that is being written."""
        if self.writer is None:
            return
        self._take_finished_checkpoints(wait=True)
        self.writer.close()
        self.writer = None

    def _take_finished_checkpoints(self, wait: bool = False) -> None:
        """Report those that were written in the background. wait: until all are; then every rank knows the same."""
        if wait:
            self.writer.wait()
        finished = self.writer.take_finished()
        self.journal.checkpoints(finished)
        for done in finished:
            if done.error is None:
                self._last_saved = done.step

    # -- the end -----------------------------------------------------------------------------------------------

    def _finish(self) -> dict:
        """Export, summarise, say how it went. GuardError where the last state could not be saved."""
        self._claim_run_dir()
        is_saved = self._is_saved()
        self._close_writer()
        if not self.journal.history or self.journal.history[-1][0] != self.account.step:  # resumed at the very end
            self._last_evaluated = None
            self._evaluate_if_due()
        summary = report.summarise(
            self.plan, self.account, self.journal.history[-1][2], *count_parameters(self.engine.module)
        )
        if problem := write_results(self.engine, self.plan, summary):
            self.view.warn(problem)
        self.view.close()
        report.closing(self.view, self.run_dir, self.journal.history, summary)
        self.journal.close()
        if not is_saved:
            raise GuardError(
                f"the state after step {self.account.step} could not be saved; the model is in "
                f"{self.run_dir / 'export'}"
            )
        self.set_status("done", exit_code=0)
        release(self.engine)
        dist.barrier()
        return json.loads(json.dumps(summary))
