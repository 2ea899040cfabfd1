"""Experts of a mixture with low-rank updates, under ZeRO."""

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from relora_ds.lowrank.wrap import lowrank_layers
from tests.parity import cases
from tests.ranks import ranks
from tests.small_models import batch


def gathered_at_the_end_of_backward() -> list[str]:
    """The frozen experts that a rank holds whole when backward has come to the embeddings.

    DeepSpeed gathers and frees the experts of some families, Mixtral's too, with the module around them. Here that is
    off, as in all other families.
    """
    zero = {"stage3_param_persistence_threshold": 0, "leaf_module": {"classes": []}}
    engine = cases.build(3, family="mixtral", zero=zero)
    experts = {name: layer for name, layer in lowrank_layers(engine.module).items() if layer.is_parameter}
    found: list[list[str]] = []

    def look(_):
        found.append([n for n, layer in experts.items() if layer.weight.ds_status != ZeroParamStatus.NOT_AVAILABLE])

    embeddings = engine.module.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, inputs, output: output.register_hook(look) and None)
    tokens = batch(0, 4)
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    assert len(experts) == 4 and len(found) == 1
    cases.release(engine)
    return found[0]


def test_backward_frees_the_experts_that_it_gathered():
    assert ranks(2).run(gathered_at_the_end_of_backward) == [[], []]
