"""APOLLO-Mini (arXiv 2412.05270): APOLLO of rank 1, with one factor for a matrix. See `matrix.apollo_update`."""

from types import MappingProxyType

from relora_ds.methods.apollo import Apollo


class ApolloMini(Apollo):
    """APOLLO with a projection on one coordinate: nearly without optimizer state."""

    name = "apollo_mini"
    has_rank = False
    defaults = MappingProxyType({**Apollo.defaults, "apollo.scale_type": "tensor", "apollo.scale": 128.0})
