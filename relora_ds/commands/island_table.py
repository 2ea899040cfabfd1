"""What `estimate --cluster` says of islands: the options of the wire between them, and the table."""

import argparse

from relora_ds.commands.recipes import rows_as_text

OUTSIDE = (0.1, 1.0)  # Gbit/s


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
        default=25_000,
        metavar="US",
        help="microseconds from one island to another, half of a round trip (default: %(default)s)",
    )


def outside_of(arguments: argparse.Namespace, count: int | None) -> list[float]:
    """Return the bandwidths to predict islands for; none where the recipe is of none.

    Raises:
        ValueError: they are given nevertheless.
    """
    if count is not None:
        return arguments.outside or list(OUTSIDE)
    if arguments.outside:
        raise ValueError(
            f"--outside: {arguments.outside[0]:g} is of the wire between islands, and the recipe has none; add e.g. "
            "islands.count=2 islands.address=HOST:5555"
        )
    return []


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
