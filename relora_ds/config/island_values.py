"""What is wrong with section `islands`, and with what other sections say of a run that is an island."""

from collections.abc import Iterator

from relora_ds.config.methods import Method
from relora_ds.config.relora_config import ReLoRAConfig
from relora_ds.config.schema import IslandsConfig, Recipe


def problems(recipe: Recipe, method: Method, warm_start: Method | None) -> Iterator[str]:
    """Yield one line a problem. Only for values that are right, each on its own."""
    islands = recipe.islands
    if islands.count is None:
        yield from _without(islands)
        return
    yield from index_problems(islands)
    if islands.address is None:
        yield "islands.address: null says not where the islands meet; use HOST:PORT of `relora islands serve`"
    if islands.timeout_s >= recipe.guard.watchdog_seconds:
        yield (
            f"islands.timeout_s: {islands.timeout_s} is not below guard.watchdog_seconds "
            f"{recipe.guard.watchdog_seconds}, which would end a run that waits for others; use e.g. "
            f"guard.watchdog_seconds={3 * islands.timeout_s}"
        )
    for phase in filter(None, (warm_start, method)):
        yield from _phase_problems(recipe, phase)


def _without(islands: IslandsConfig) -> Iterator[str]:
    if changed := [name for name, value in vars(islands).items() if value != getattr(IslandsConfig(), name)]:
        yield f"islands.{changed[0]}: {getattr(islands, changed[0])} needs islands.count; set it, e.g. islands.count=2"


def _phase_problems(recipe: Recipe, method: Method) -> Iterator[str]:
    islands, relora = recipe.islands, method.relora
    if relora is None or relora.restart_every is None or not method.is_chain:
        if method.has_owners:
            yield (
                f"islands.count: {islands.count} with method {method.name}, whose owners update whole weights: what "
                "becomes of these is not exchanged; use method=full, relora or galore"
            )
        elif relora is not None:
            yield (
                f"islands.count: {islands.count} with method {method.name}: without restarts there is no step at which "
                "updates could be exchanged; use method=relora or galore"
            )
        elif islands.sync_every is None:
            yield (
                f"islands.sync_every: null, and method {method.name} has no restarts to exchange at; use e.g. "
                "islands.sync_every=500"
            )
        return
    yield from chain_problems(relora)


def index_problems(islands: IslandsConfig) -> Iterator[str]:
    """Yield what is wrong with the number of an island."""
    if islands.count is not None and islands.index >= islands.count:
        yield (
            f"islands.index: {islands.index} is not below islands.count {islands.count}; number the islands from 0 to "
            f"{islands.count - 1}"
        )


def chain_problems(relora: ReLoRAConfig) -> Iterator[str]:
    """Yield why islands could not exchange at the restarts of a chain."""
    if relora.restart_every is not None and relora.restart_every <= relora.restart_warmup_steps:
        yield (
            f"relora.restart_every: {relora.restart_every} is not above relora.restart_warmup_steps "
            f"{relora.restart_warmup_steps}, so islands would exchange within the ramp; use a longer cycle"
        )
    if relora.residual_every is not None:
        yield (
            f"relora.residual_every: {relora.residual_every} changes W between restarts by more than islands "
            "exchange; use relora.residual_every=null"
        )
    if relora.restart_init == "gradient" and relora.gradient_estimate != "sketch":
        yield (
            f"relora.gradient_estimate: {relora.gradient_estimate} is no sum over islands that a slow link could "
            "carry; use relora.gradient_estimate=sketch"
        )
