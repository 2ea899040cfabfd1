"""What `estimate --cluster` says of islands: the options of the wire between them, and the table."""

import argparse

from relora_ds.commands.recipes import rows_as_text

OUTSIDE = (0.1, 1.0)  # Gbit/s
LATENCY = 25_000.0  # microseconds


def add_outside_options(parser: argparse.ArgumentParser) -> None:
    """Add the wire between islands, each of them a cluster."""
    parser.add_argument(
        "--outside",
        type=float,
        nargs="+",
        metavar="GBIT",
        help="where the recipe has islands.count, each a cluster: Gbit/s that an island sends and receives (default: "
        f"{' '.join(f'{gbits:g}' for gbits in OUTSIDE)})",
    )
    parser.add_argument(
        "--outside-latency",
        type=float,
        metavar="US",
        help=f"microseconds from one island to another, half of a round trip (default: {LATENCY:g})",
    )


def outside_of(arguments: argparse.Namespace, count: int | None) -> tuple[list[float], float]:
    """Return the bandwidths to predict islands for, and the latency in microseconds.

    There are no bandwidths for a recipe without islands.

    Raises:
        ValueError: an option is given that nothing is predicted with.
    """
    given = {"--outside": (arguments.outside or [None])[0], "--outside-latency": arguments.outside_latency}
    for option, value in given.items():
        if value is None:
            continue
        if count is None:
            raise ValueError(
                f"{option}: {value:g} is of the wire between islands, and the recipe has none; add e.g. "
                "islands.count=2 islands.address=HOST:5555"
            )
        if not arguments.cluster:
            raise ValueError(f"{option}: {value:g} is of the wire between clusters; add e.g. --cluster 1x8")
    latency = LATENCY if arguments.outside_latency is None else arguments.outside_latency
    return ([] if count is None else arguments.outside or list(OUTSIDE)), latency


def islands_as_text(clusters: list[dict], count: int | None, latency: float) -> list[str]:
    """Return the table. clusters: the entries of `estimate --json`."""
    from relora_ds.utils.text import human_bytes

    head = ["cluster", "network", "outside", "stage", "method", "sent", "every", "exchange", "share", "step"]
    rows = [[*head, "data parallel", "speed"]]
    for entry in clusters:
        network = f"{entry['network_gbits']:g} Gbit/s" if entry["network_gbits"] else "-"
        for islands in entry["islands"]:
            rows.append(
                [
                    f"{entry['nodes']}x{entry['devices']}",
                    network,
                    f"{islands['outside_gbits']:g} Gbit/s",
                    str(entry["stage"]),
                    entry["method"],
                    human_bytes(islands["exchange_bytes"]),
                    f"{islands['every']:,}",
                    f"{islands['exchange']:.3g} s",
                    f"{100 * islands['share']:.1f} %",
                    f"{islands['seconds']:.3g} s",
                    f"{islands['data_parallel']['seconds']:.3g} s",
                    f"{islands['data_parallel']['seconds'] / islands['seconds']:.2f}x",
                ]
            )
    if len(rows) == 1:
        return []
    return [
        "",
        f"{count} islands, each such a cluster; predicted, not measured",
        *rows_as_text(rows, num_left=5),
        "",
        "  sent: by an island in an exchange, and received of each other one; every: steps between two exchanges",
        "  share: of the time, in exchanges; step: the mean, with its part of an exchange",
        "  data parallel: a step of all islands' batches by one run, over the wire between them",
        f"  outside {latency:g} us; the server's connection is taken to be wider; nobody waits for slower islands",
    ]
