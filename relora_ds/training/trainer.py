"""One run, from a checked plan to an exported model. `fit` reads from top to bottom."""

import dataclasses
import json
import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from relora_ds.checkpoint import store
from relora_ds.checkpoint.files import write_json, write_text
from relora_ds.checkpoint.manifest import DamagedError
from relora_ds.checkpoint.state import problems, restore
from relora_ds.checkpoint.writer import CheckpointWriter
from relora_ds.data import TrainLoader
from relora_ds.data.agreement import require_same_tokens
from relora_ds.interop.export import model_card
from relora_ds.lowrank.wrap import count_parameters
from relora_ds.models.build import meta_model
from relora_ds.training import identity, report
from relora_ds.training.accounting import Account, StepTraffic
from relora_ds.training.console import View
from relora_ds.training.evaluation import Evaluation, evaluate
from relora_ds.training.guard import NonFiniteGuard
from relora_ds.training.metrics import MetricsLog
from relora_ds.training.phases import Phase, build_engine, hand_over, phases_of
from relora_ds.training.preflight import Plan
from relora_ds.training.samples import draw_samples, first_documents
from relora_ds.zero.moments import max_update_over_lr
from relora_ds.zero.start import init_distributed
from relora_ds.zero.teardown import release
from relora_ds.zero.traffic import count_traffic

DRIFT_PROBE_SEQUENCES = 4
UPDATE_METRIC_STEPS = 10  # after a restart: for so many steps the size of the updates is a metric


class Trainer:
    """Trains one recipe.

    Attributes:
        plan: what `preflight.check` returned.
        account: totals so far.
        history: (step, phase, Evaluation) of this process's evaluations.
    """

    def __init__(self, plan: Plan):
        self.plan, self.recipe = plan, plan.recipe
        self.run_dir = Path(self.recipe.run_dir)
        self.account = Account()
        self.guard = NonFiniteGuard(self.recipe.guard.max_bad_steps)
        self.history: list[tuple[int, str, Evaluation]] = []
        self.engine = self.writer = None
        self.is_first = self.is_open = False

    def fit(self) -> dict:
        """Train to the end; returns what is in summary.json. Collective."""
        checkpoint = self._find_checkpoint()
        phases = phases_of(self.recipe)
        now = phases[0].name if checkpoint is None else checkpoint.manifest.run["phase"]
        first = [phase.name for phase in phases].index(now)
        if checkpoint is None:
            self._open_run(None)
        for phase in phases[first:]:
            self._build(phase, checkpoint)
            if not self.is_open:  # a checkpoint that is refused leaves everything as it was
                self._open_run(checkpoint)
            self._enter(phase, checkpoint)
            checkpoint = None
            while self.account.step < phase.stop:
                self._train_step()
                if self.engine.was_step_applied():
                    self._evaluate_if_due()
                    self._checkpoint_if_due()
                self._report_checkpoints()
        return self._finish()

    def set_status(self, state: str, reason: str = "", exit_code: int | None = None) -> None:
        """Replace status.json: rank 0, or whichever rank failed. Nothing happens before the run directory is ours."""
        if self.is_open and (self.is_first or state == "failed"):
            write_json(self.run_dir / "status.json", {
                "state": state, "step": self.account.step, "reason": reason, "exit_code": exit_code,
                "time": time.time()})

    # -- the run and its phases --------------------------------------------------------------------------------

    def _find_checkpoint(self) -> store.Found | None:
        """Start the process group, find the checkpoint to go on from. Nothing is written."""
        init_distributed()
        self.is_first = dist.get_rank() == 0
        self.view = View(self.is_first, self.recipe.total_steps)
        require_same_tokens(self.plan.data.fingerprint)
        checkpoint = store.find(self.run_dir, self.recipe.resume)
        if checkpoint is not None:
            identity.require_same_run(checkpoint.manifest, self.plan)
        return checkpoint

    def _open_run(self, checkpoint: store.Found | None) -> None:
        """Make the run directory ours, and go on in it from a checkpoint."""
        saved = checkpoint and checkpoint.manifest
        dist.barrier()  # every rank has checked the recipe; one that still looks must not find our run directory
        if self.is_first:
            if self.recipe.overwrite and self.run_dir.exists():
                shutil.rmtree(self.run_dir)
            (self.run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
            self.plan.tokenizer.save_pretrained(self.run_dir / "checkpoints" / "tokenizer")  # for their export
            write_text(self.run_dir / "recipe.yaml", self.recipe.to_yaml())
            if checkpoint is not None:
                store.drop_after(self.run_dir, saved.step)
        dist.barrier()
        self.is_open = True
        if checkpoint is not None:
            self.account = Account(**saved.run["account"])
        data, recipe = self.plan.data, self.recipe
        self.loader = TrainLoader(data.train, recipe.data.seq_len, recipe.batch_sequences,
                                  recipe.train.micro_batch_size, dist.get_rank(), dist.get_world_size(), recipe.seed,
                                  data.padding)
        if checkpoint is not None:
            self.loader.load_state_dict(saved.run["loader"])
        self.metrics = MetricsLog(self.run_dir, enabled=self.is_first,
                                  # -1: an attempt that left no checkpoint is forgotten
                                  resume_step=-1 if checkpoint is None else self.account.step)
        self.metrics.text("recipe", report.as_code(recipe.to_yaml()), self.account.step)
        self.prompts = first_documents(data.validation, data.eos_id, recipe.eval.samples, recipe.data.seq_len)
        self.full_rank_elements = count_parameters(meta_model(self.plan.model_config))[0]
        for line in report.opening(self.plan, phases_of(recipe), checkpoint and self.account.step):
            self.view.line(line)
        for warning in (*self.plan.warnings(), *(checkpoint.passed_over if checkpoint else ()),
                        *(identity.changes(saved, self.plan) if checkpoint else ())):
            self.view.warn(warning)
        self.set_status("running")

    def _build(self, phase: Phase, checkpoint: store.Found | None) -> None:
        """Build the engine of a phase: from the engine before it, from a checkpoint, or from nothing."""
        if self.writer is not None:
            self.writer.close()
        handover = hand_over(self.engine, self.plan, phase) if self.engine is not None else None
        self.engine, self.phase = build_engine(self.plan, phase, handover, checkpoint is not None), phase
        if checkpoint is not None:
            if found := problems(checkpoint.manifest, self.engine):
                raise store.ResumeError(f"resume: {checkpoint.directory} is of another network: {'; '.join(found)}")
            try:
                restore(self.engine, checkpoint.directory, checkpoint.manifest)
            except DamagedError as error:
                raise store.ResumeError(f"resume: {error}") from error

    def _enter(self, phase: Phase, checkpoint: store.Found | None) -> None:
        """Begin to train and to measure with a new engine."""
        self.writer = CheckpointWriter(self.engine, self.run_dir / "checkpoints", self._prune_checkpoints,
                                       checkpoint and (checkpoint.directory, checkpoint.manifest))
        length = self.recipe.data.seq_len
        rows = min(DRIFT_PROBE_SEQUENCES, self.recipe.train.micro_batch_size, len(self.plan.data.validation) // length)
        probe = torch.from_numpy(self.plan.data.validation[:rows * length].astype("int64")).view(rows, length).to(
            self.engine.device)
        self.engine.drift_probe = (lambda: self.engine.module(input_ids=probe).logits) if len(probe) else None
        self.traffic = StepTraffic(self.engine, self.full_rank_elements)
        self._step_seconds: list[float] = []
        self._typical_seconds: float | None = None
        self._last_evaluated = None
        trainable, total = count_parameters(self.engine.module)
        self.trainable = trainable
        self.view.line(report.phase_line(phase, self.account.step, trainable, total))
        self.metrics.write("phase", **self._where(), trainable_parameters=trainable, total_parameters=total)

    # -- the loop ----------------------------------------------------------------------------------------------

    def _train_step(self) -> None:
        """One optimizer step on the next batch: forward, backward, reduce, Adam and, if it is due, a restart."""
        engine, account = self.engine, self.account
        lr, restarts_before = engine.get_lr()[0], len(engine.restarts)
        sampling = self.traffic.wants_sample()
        started = time.perf_counter()
        loss = torch.zeros((), dtype=torch.float64, device=engine.device)
        with count_traffic() if sampling else nullcontext() as sample:
            for micro_batch in self.loader.next_step():
                output = engine(**{name: value.to(engine.device) for name, value in micro_batch.items()})
                engine.backward(output.loss)
                engine.step()
                loss += output.loss.detach().double() / self.plan.accumulation
        self.guard.record(engine.was_step_applied())
        seconds = time.perf_counter() - started
        restarted = len(engine.restarts) > restarts_before
        self.traffic.record(sample, is_regular=engine.was_step_applied() and not restarted)
        if not sampling:
            self._step_seconds.append(seconds)

        account.tokens += self.recipe.tokens_per_step
        account.seconds += seconds
        account.bytes_payload += self.traffic.payload
        account.bytes_wire += self.traffic.wire
        account.full_rank_payload += self.traffic.full_rank[0]
        account.full_rank_wire += self.traffic.full_rank[1]
        if not engine.was_step_applied():
            account.skipped += 1
            self.view.line(f"after step {account.step}: a non-finite loss or gradient, no rank applied the step")
            return
        account.step = self.phase.start + engine.t
        if restarted:
            self._report_restart()
        self._log(loss, lr, seconds)

    def _log(self, loss: torch.Tensor, lr: float, seconds: float) -> None:
        engine, account, recipe = self.engine, self.account, self.recipe
        # After a restart every step goes into the metrics: its first updates are where a bad reset shows.
        after_restart = bool(engine.restarts) and 0 < engine.t - engine.restarts[-1] <= UPDATE_METRIC_STEPS
        shown = account.step % recipe.log.every == 0 or account.step == recipe.total_steps
        figures = ""
        if shown or after_restart:
            dist.all_reduce(loss)
            extra = {}
            if after_restart:
                extra["max_update_over_lr"] = max_update_over_lr(
                    engine.shards, [n for n in engine.shards.names if n.endswith("lora_A")],
                    betas=tuple(recipe.optim.betas), eps=recipe.optim.eps, device=engine.device)
            if self._step_seconds:  # else the newest step was sampled, or ended with a restart
                self._typical_seconds, self._step_seconds = sum(self._step_seconds) / len(self._step_seconds), []
            typical = self._typical_seconds or seconds
            line = {"loss": loss.item() / dist.get_world_size(), "lr": lr,
                    "grad_norm": float(engine.get_global_grad_norm()), "tokens": account.tokens,
                    "tokens_per_s": recipe.tokens_per_step / typical, "step_s": seconds,
                    "bytes_payload": self.traffic.payload, "bytes_wire": self.traffic.wire,
                    "total_bytes_wire": account.bytes_wire, "full_rank_bytes_wire": account.full_rank_wire,
                    "peak_memory_bytes": report.peak_memory(engine.device), "restarts": account.restarts}
            self.metrics.write("train", **self._where(), **line, **extra)
            figures = f"loss {line['loss']:.4f}  lr {lr:.1e}  {line['tokens_per_s']:,.0f} tok/s"
        self.view.step(account.step, recipe.total_steps, self.phase.name, figures, shown)

    def _report_restart(self) -> None:
        done = self.engine.last_restart
        self.account.restarts += 1
        self.metrics.write("restart", **self._where(), **{
            "restarts": self.account.restarts, "prune_fraction_m": done.prune_fraction_m,
            "prune_fraction_v": done.prune_fraction_v, "merge_drift": done.merge_drift, "merge_loss": done.merge_loss,
            "merge_loss_total": done.merge_loss_total,
            "update_norms": done.update_norms, "relative_update_norms": done.relative_update_norms,
            "restart_s": done.restart_s, "checksum": done.checksum})
        self.view.line(report.restart_line(self.account.step, done))

    def _evaluate_if_due(self) -> None:
        """At every multiple of `eval.every`, at the end of a cycle without one, and at the end of a phase."""
        step, every, restarts = self.account.step, self.recipe.eval.every, self.engine.restarts
        due = step == self.phase.stop or (every is not None and step % every == 0)
        if restarts and restarts[-1] == self.engine.t:  # a cycle has just ended
            began = self.phase.start + (restarts[-2] if len(restarts) > 1 else 0)
            due = due or every is None or step // every == began // every
        if not due or self._last_evaluated == step:
            return
        self._last_evaluated = step
        result = evaluate(self.engine, self.plan.data, seq_len=self.recipe.data.seq_len,
                          micro_batch_size=self.recipe.train.micro_batch_size, device=self.engine.device)
        self.history.append((step, self.phase.name, result))
        samples = draw_samples(self.engine, self.plan.tokenizer, self.prompts, seq_len=self.recipe.data.seq_len,
                               seed=self.recipe.seed, device=self.engine.device)
        self.metrics.write("eval", **self._where(), **vars(result), samples=[dataclasses.asdict(s) for s in samples])
        self.view.line(report.evaluation_line(step, result, self.account))
        for sample in samples:
            self.view.line(report.sample_line(sample, self.view.width))
        if samples:
            self.metrics.text("samples", report.samples_text(samples), step)

    def _checkpoint_if_due(self) -> None:
        step, settings = self.account.step, self.recipe.checkpoint
        if not (step == self.recipe.total_steps or (settings.every and step % settings.every == 0)):
            return
        self.writer.save(step, {"phase": self.phase.name, "loader": self.loader.state_dict(),
                                "account": self.account.state(), **identity.of(self.plan)})
        self.set_status("running")

    def _prune_checkpoints(self) -> None:
        settings = self.recipe.checkpoint
        store.prune(self.run_dir, settings.keep_last, settings.keep_every)

    def _report_checkpoints(self) -> None:
        """Those that were completed in the background since the last call."""
        for done in self.writer.take_finished():
            if done.error is not None:
                self.view.warn(f"the checkpoint after step {done.step} failed: {done.error}; training goes on, and the "
                               "checkpoints before it stay")
                continue
            self.metrics.write("checkpoint", **{**self._where(), "step": done.step}, bytes=done.bytes,
                               new_bytes=done.new_bytes, stall_s=done.stall_s, write_s=done.write_s)
            self.view.line(report.checkpoint_line(done))

    # -- the end -----------------------------------------------------------------------------------------------

    def _finish(self) -> dict:
        """Export, summarise, say how it went."""
        self.writer.close()
        self._report_checkpoints()
        if not self.history:  # resumed at the very end
            self._last_evaluated = None
            self._evaluate_if_due()
        summary = report.summarise(self.plan, self.account, self.history[-1][2], self.trainable,
                                   count_parameters(self.engine.module)[1])
        self.engine.save_merged(str(self.run_dir / "export"))
        if self.is_first:
            self.plan.tokenizer.save_pretrained(self.run_dir / "export")
            write_text(self.run_dir / "export" / "README.md", model_card(summary, self.recipe.to_yaml()))
            write_json(self.run_dir / "summary.json", summary)
        self.view.close()
        report.closing(self.view, self.run_dir, self.history, summary)
        self.metrics.close()
        self.set_status("done", exit_code=0)
        release(self.engine)
        dist.barrier()
        return json.loads(json.dumps(summary))

    def _where(self) -> dict:
        return {"step": self.account.step, "t": self.engine.t, "phase": self.phase.name}
