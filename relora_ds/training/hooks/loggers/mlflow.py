"""MLflow: the server that MLFLOW_TRACKING_URI names, else RUN/mlflow/mlflow.db."""

import logging
import os
import time
from typing import Any, NamedTuple

from relora_ds.training.hooks.loggers.logger import Logger

_EXPERIMENT = "relora_ds"
_LONGEST = 500  # characters of a parameter's value
_RUN_DIR = "relora_ds.run_dir"


class _Target(NamedTuple):
    client: Any
    run_id: str


class MLflow(Logger):
    """A run in the experiment MLFLOW_EXPERIMENT_NAME, or relora_ds. A resumed run continues as the same one."""

    name = "MLflow"
    install = "mlflow"

    def _open(self) -> _Target:
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        directory = (self.run_dir / "mlflow").absolute()
        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if uri is None:
            directory.mkdir(exist_ok=True)
            uri, artifacts = f"sqlite:///{directory / 'mlflow.db'}", (directory / "artifacts").as_uri()
        client = MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _EXPERIMENT)
        found = client.get_experiment_by_name(name)
        experiment = client.create_experiment(name, artifacts) if found is None else found.experiment_id
        run_id = self._earlier_run(client, experiment)
        if run_id is None:
            tags = {_RUN_DIR: str(self.run_dir.absolute())}
            run_id = client.create_run(experiment, run_name=self._run_name(), tags=tags).info.run_id
            self._send_settings(client, run_id)
        else:
            client.update_run(run_id, status="RUNNING")
        return _Target(client, run_id)

    def _earlier_run(self, client: Any, experiment: str) -> str | None:
        """Return the newest run of this directory, if this one is resumed."""
        if self.resume_step is None or self.resume_step < 0:
            return None
        condition = f"tags.`{_RUN_DIR}` = '{self.run_dir.absolute()}'"
        found = client.search_runs([experiment], condition, max_results=1, order_by=["attributes.start_time DESC"])
        return found[0].info.run_id if found else None

    def _send_settings(self, client: Any, run_id: str) -> None:
        from mlflow.entities import Param

        settings = [Param(name, str(value)[:_LONGEST]) for name, value in self._settings().items()]
        for some in _parts(settings, 100):
            client.log_batch(run_id, params=some)

    def _send(self, target: _Target, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        for some in _parts([Metric(name, value, now, step) for name, value in values.items()], 1000):
            target.client.log_batch(target.run_id, metrics=some)

    def _send_text(self, target: _Target, tag: str, markdown: str, step: int) -> None:
        target.client.log_text(target.run_id, markdown, f"{tag}/step_{step:08d}.md")

    def _close(self, target: _Target) -> None:
        target.client.set_terminated(target.run_id)


def _parts(items: list[Any], most: int) -> list[list[Any]]:
    """Split a list into parts that fit into a request."""
    return [items[first : first + most] for first in range(0, len(items), most)]
