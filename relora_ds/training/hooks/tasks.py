"""The complete run's scores on downstream tasks."""

import logging
from typing import Any

import torch.distributed as dist

from relora_ds.interop.lm_scores import scores
from relora_ds.training.hooks.hook import Hook
from relora_ds.training.results import TASKS
from relora_ds.training.state import RunState
from relora_ds.training.validation import in_evaluation
from relora_ds.utils.files import write_json

logger = logging.getLogger(__name__)


class TaskScores(Hook):
    """Evaluates the network on `eval.tasks` when the model is exported, and adds the scores to the summary.

    It comes before the hooks that show the summary. A task that fails costs a warning: the run is complete.
    """

    def on_end(self, run: RunState, summary: dict[str, Any]) -> None:
        plan, recipe = run.plan, run.recipe
        if plan.tasks is None:
            return
        logger.info("evaluating on %s", ", ".join(recipe.eval.tasks))
        try:
            with in_evaluation(run.engine):
                summary[TASKS] = scores(
                    run.engine,
                    plan.tokenizer,
                    plan.tasks,
                    batch_size=recipe.train.micro_batch_size,
                    max_length=recipe.data.seq_len - 1,
                    of_run=True,
                )
        except Exception as error:
            if isinstance(error, RuntimeError) and dist.get_world_size() > 1:
                raise  # torch's may be of this rank alone, for which the others then wait
            logger.warning(
                "eval.tasks: %s; `relora eval %s --tasks %s` evaluates the exported model",
                error,
                run.run_dir,
                " ".join(recipe.eval.tasks),
            )
            return
        if dist.get_rank() == 0:
            write_json(run.run_dir / "summary.json", summary)
