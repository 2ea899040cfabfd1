"""kubeflow.yaml: objects of Kubeflow's API that agree with each other, with the image and with the exit codes."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from relora_ds.training import exit_codes
from tests.launch.scripts import ROOT, SCRIPTS, run, start
from tests.training.runs import status

models = pytest.importorskip("kubeflow_trainer_api.models", reason="the extra .[test]")
DOCUMENTS = {one["kind"]: one for one in yaml.safe_load_all((SCRIPTS / "kubeflow.yaml").read_text(encoding="utf-8"))}
MODELS = {
    "PersistentVolumeClaim": models.IoK8sApiCoreV1PersistentVolumeClaim,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    "TrainJob": models.TrainerV1alpha1TrainJob,
}
RUNTIME, JOB = DOCUMENTS["TrainingRuntime"], DOCUMENTS["TrainJob"]
JOB_SET = RUNTIME["spec"]["template"]["spec"]
(REPLICATED,) = JOB_SET["replicatedJobs"]
BATCH_JOB = REPLICATED["template"]["spec"]
POD = BATCH_JOB["template"]["spec"]
(CONTAINER,) = POD["containers"]
ENVIRONMENT = {one["name"]: one["value"] for one in CONTAINER["env"]}
# What Trainer sets in the container `node` of the second of two pods.
TRAINER_SETS = {
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "auto",
    "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": f"{JOB['metadata']['name']}-node-0-0.{JOB['metadata']['name']}",
    "PET_MASTER_PORT": "29500",
}


def unknown(written, understood, path="") -> list[str]:
    """Return what of a document its model did not understand: the models pass over unknown fields."""
    if isinstance(written, dict):
        known = [key for key in written if key in understood]
        below = [one for key in known for one in unknown(written[key], understood[key], f"{path}.{key}")]
        return [f"{path}.{key}" for key in written if key not in understood] + below
    if isinstance(written, list):
        return [
            one
            for number, pair in enumerate(zip(written, understood, strict=True))
            for one in unknown(*pair, f"{path}[{number}]")
        ]
    return [] if written == understood else [f"{path}: {written}, understood as {understood}"]


def test_every_document_has_a_model():
    assert list(DOCUMENTS) == list(MODELS)


@pytest.mark.parametrize("kind", MODELS)
def test_the_api_knows_every_field(kind):
    document = DOCUMENTS[kind]
    assert unknown(document, MODELS[kind].from_dict(document).to_dict()) == []


def test_an_unknown_field_is_found():
    job = {**JOB, "spec": {**JOB["spec"], "trainer": {**JOB["spec"]["trainer"], "nodes": 2}}}
    assert unknown(job, models.TrainerV1alpha1TrainJob.from_dict(job).to_dict()) == [".spec.trainer.nodes"]


def test_what_trainer_looks_for():
    """The names by which Trainer finds the container that it gives the PET_ variables, and sets nothing reserved."""
    assert REPLICATED["name"] == CONTAINER["name"] == "node" and REPLICATED["replicas"] == 1
    assert REPLICATED["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert RUNTIME["spec"]["mlPolicy"] == {"numNodes": JOB["spec"]["trainer"]["numNodes"], "torch": {}}
    assert JOB["spec"]["runtimeRef"]["name"] == RUNTIME["metadata"]["name"]
    assert JOB["spec"]["runtimeRef"]["kind"] == "TrainingRuntime"
    assert not ENVIRONMENT.keys() & TRAINER_SETS.keys()
    assert set(re.findall(r"\$\((\w+)\)", " ".join(CONTAINER["command"]))) <= TRAINER_SETS.keys()


def reaction(exit_code: int, disrupted: bool = False) -> str:
    """Return what JobSet does after a pod ended so, as Kubernetes and JobSet read the rules: the first that matches."""
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for rule in BATCH_JOB["podFailurePolicy"]["rules"]:
        assert rule["action"] == "FailJob"
        if "onExitCodes" in rule:
            assert (rule["onExitCodes"]["containerName"], rule["onExitCodes"]["operator"]) == ("node", "In")
            applies, about = exit_code in rule["onExitCodes"]["values"], f"failed with exit code {exit_code} matching"
        else:
            assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
            applies, about = disrupted, "has condition DisruptionTarget matching"
        if applies:
            reason, message = "PodFailurePolicy", f"Container node for pod a/b {about} FailJob rule at index 0"
            break
    for rule in JOB_SET["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"  # counts towards maxRestarts


@pytest.mark.parametrize(
    ("exit_code", "disrupted", "expected"),
    [
        (exit_codes.PREEMPTED, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (exit_codes.PREEMPTED, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),  # its node was lost, or it took too long to save
        (exit_codes.RECIPE, False, "FailJobSet"),
        (exit_codes.ERROR, False, "RestartJobSet"),
        (exit_codes.GUARD, False, "RestartJobSet"),  # also the watchdog, where another node is gone
        (exit_codes.RESUME, False, "RestartJobSet"),  # also a lock that a lost node still holds
        (134, False, "RestartJobSet"),  # aborted by NCCL
    ],
)
def test_what_follows_an_exit_code(exit_code, disrupted, expected):
    assert BATCH_JOB["backoffLimit"] == 0 and POD["restartPolicy"] == "Never"
    assert 0 < JOB_SET["failurePolicy"]["maxRestarts"] < 100
    assert reaction(exit_code, disrupted) == expected


def test_kubernetes_waits_longer_than_the_launch_scripts():
    """start_ranks.py kills ranks after GRACE_SECONDS, launch.sh waits a little longer, and then the pod may end."""
    found = re.search(r"second < \$\{GRACE_SECONDS:-(\d+)\} \+ (\d+)", (SCRIPTS / "launch.sh").read_text())
    grace, longer = int(ENVIRONMENT["GRACE_SECONDS"]), int(found[2])
    assert grace >= int(found[1]) == 30
    assert POD["terminationGracePeriodSeconds"] >= grace + longer + 10


def test_the_volumes():
    volumes = {one["name"]: one for one in POD["volumes"]}
    mounts = {one["mountPath"]: volumes[one["name"]] for one in CONTAINER["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    claim = DOCUMENTS["PersistentVolumeClaim"]
    assert mounts["/workspace"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]  # each node writes its part of a checkpoint
    assert all(ENVIRONMENT[name].startswith("/workspace/") for name in ("RELORA_DS_CACHE", "HF_HOME"))
    (run_dir,) = [one for one in JOB["spec"]["trainer"]["args"] if one.startswith("run_dir=")]
    assert run_dir.startswith("run_dir=/workspace/")


def test_it_runs_what_the_image_has():
    image = (SCRIPTS / "Dockerfile").read_text(encoding="utf-8")
    assert f"\nUSER {POD['securityContext']['runAsUser']}:{POD['securityContext']['runAsGroup']}\n" in image
    assert POD["securityContext"]["fsGroup"] == POD["securityContext"]["runAsGroup"]
    assert CONTAINER["command"][:3] == ["tini", "--", "bash"]
    assert Path(CONTAINER["command"][3]) == Path("/opt/relora_ds") / "launch_scripts/multi_node.sh"


def command(variables: dict[str, str]) -> list[str]:
    """Return the container's command as Kubernetes writes variables into it, in this checkout and without tini."""
    shell, script, *rest = CONTAINER["command"][2:]
    rest = [re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], word) for word in rest]
    return [shell, script.replace("/opt/relora_ds", str(ROOT)), *rest]


def test_the_command_starts_the_ranks_of_a_node(tmp_path):
    """As Kubernetes does, on node 1, with a recipe that the ranks refuse."""
    arguments = [*JOB["spec"]["trainer"]["args"], f"run_dir={tmp_path / 'r'}", "relora.r=0"]
    code, printed = run(*command(TRAINER_SETS), *arguments, cwd=tmp_path, GRACE_SECONDS=ENVIRONMENT["GRACE_SECONDS"])
    assert code == exit_codes.RECIPE, printed
    assert f"node 1 of 2: 2 rank(s); node 0 is {TRAINER_SETS['PET_MASTER_ADDR']}:29500" in printed
    assert printed.count("error: ") == 1 and "relora.r: " in printed and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_pod_that_is_preempted_takes_the_other_along_and_both_resume(tmp_path, free_port):
    """Two pods on one machine; the eviction of one, and what JobSet does then."""
    variables = {**TRAINER_SETS, "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": free_port}

    def pods(steps: int) -> list[subprocess.Popen]:
        settings = [f"run_dir={tmp_path / 'r'}", "resume=auto", "train.micro_batch_size=2", f"train.steps={steps}"]
        ranks = ("0", "1")
        return [
            start(*command({**variables, "PET_NODE_RANK": rank}), "tiny", *settings, cwd=tmp_path) for rank in ranks
        ]

    first, second = pods(100_000)
    printed = []
    try:
        for line in first.stdout:
            printed.append(line)
            if line.startswith("step     12/"):
                break
        second.terminate()
        codes = [pod.wait(timeout=300) for pod in (first, second)]
        assert codes == [exit_codes.PREEMPTED] * 2, "".join(printed)
    finally:
        for pod in (first, second):
            pod.stdout.close()
            pod.terminate()
    stopped = status(tmp_path / "r")["step"]
    assert stopped >= 12
    first, second = pods(stopped + 6)
    printed = [pod.communicate(timeout=600)[0] for pod in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), printed
    assert f"resuming after step {stopped}" in printed[0] and status(tmp_path / "r")["state"] == "done"
