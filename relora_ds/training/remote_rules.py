"""What a start may do with the store that a recipe names: begin there, continue its run, replace it, or nothing."""

from pathlib import Path

from relora_ds.config import Recipe
from relora_ds.remote.place import Place, RemoteError
from relora_ds.remote.stored_run import StoredRun
from relora_ds.training.run_directory import resumes_in_place


def early_remote_problems(recipe: Recipe) -> list[str]:
    """Return why checkpoints cannot be uploaded; a small file is written there and deleted again."""
    if recipe.checkpoint.remote is None:
        return []
    try:
        place = Place(recipe.checkpoint.remote)
        place.probe()
        return occupied(recipe, StoredRun(place))
    except RemoteError as error:
        return [refused(recipe, error)]
    except ValueError as error:
        return [f"checkpoint.remote: {error}"]


def refused(recipe: Recipe, error: RemoteError) -> str:
    """Return the message for a store that refuses at the start."""
    return (
        f"checkpoint.remote: {recipe.checkpoint.remote} cannot be used ({error}); create the bucket, or correct the "
        "URL, or the credentials in the environment"
    )


def occupied(recipe: Recipe, run: StoredRun) -> list[str]:
    """Return why this run must not write where the store has a run. RemoteError where it refuses."""
    begun_in, url = run.begun_in(), run.place.url
    if begun_in is None:
        return []
    if begun_in and Path(begun_in).name != recipe.directory.name:
        return [
            f"checkpoint.remote: {url} holds the run of run_dir {begun_in}, and this one's is {recipe.run_dir}; use "
            f"another prefix, or a run_dir named {Path(begun_in).name} to continue that run"
        ]
    if recipe.overwrite or recipe.resume == "auto" or resumes_in_place(recipe):
        return []
    return [
        f"checkpoint.remote: {url} holds a run already; set resume=auto to continue it, overwrite=true to delete it, "
        "or another prefix"
    ]


def is_stored(recipe: Recipe) -> bool:
    """Return whether `resume=auto` finds a checkpoint in the store, as far as one look tells."""
    if recipe.checkpoint.remote is None or recipe.resume != "auto":
        return False
    try:
        return bool(StoredRun(Place(recipe.checkpoint.remote)).complete())
    except (RemoteError, ValueError):  # reported by its own check
        return False
