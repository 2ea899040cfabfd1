"""Options that describe a cluster which nobody has to own: what its wires carry and what its GPUs reach."""

import argparse


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Add them, with defaults."""
    parser.add_argument(
        "--network",
        type=float,
        nargs="+",
        default=[10, 25, 100, 400],
        metavar="GBIT",
        help="Gbit/s that a host sends, in all (default: 10 25 100 400)",
    )
    parser.add_argument(
        "--network-latency",
        type=float,
        default=20,
        metavar="US",
        help="microseconds from one host to the next (default: %(default)s)",
    )
    parser.add_argument(
        "--inside",
        type=float,
        default=2400,
        metavar="GBIT",
        help="Gbit/s that a GPU sends to its neighbour in the host (default: %(default)s)",
    )
    parser.add_argument(
        "--inside-latency", type=float, default=5, metavar="US", help="microseconds between them (default: %(default)s)"
    )
    parser.add_argument(
        "--tflops",
        type=float,
        default=150,
        help="what a GPU reaches while it trains, not its data sheet's; assumed (default: %(default)s)",
    )
