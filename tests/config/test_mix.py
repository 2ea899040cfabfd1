"""`data.mix`: a list of mappings, read, checked and stored like the rest of a recipe."""

import pytest

from relora_ds.config import RecipeError, load_recipe, no_effect
from relora_ds.config.data_config import MixSource, of_part

pytestmark = pytest.mark.usefixtures("base_recipe")
WIKI = "{source: wikitext2, weight: 0.5}"


def mix(*items: str) -> str:
    return f"data.mix=[{', '.join(items)}]"


def test_a_mixture_is_read_from_the_command_line_and_from_a_file_and_stored(tmp_path):
    written = mix(
        "{source: wikitext2, weight: 0.25}", "{path: '01.jsonl', weight: 75e-2, max_tokens: 1_000, name: own}"
    )
    recipe = load_recipe("base.yaml", [written], check_files=False)
    assert recipe.data.mix == [
        MixSource(source="wikitext2", weight=0.25),
        MixSource(source="text", path="01.jsonl", weight=0.75, max_tokens=1000, name="own"),
    ]
    stored = tmp_path / "stored.yaml"
    stored.write_text(recipe.to_yaml())
    assert load_recipe(stored, check_files=False) == recipe
    stored.write_text(
        "extends: base.yaml\ndata:\n  mix:\n    - {source: wikitext2, weight: 0.25}\n    - weight: 0.75\n"
        "      path: '01.jsonl'\n      max_tokens: 1000\n      name: own\n"
    )
    (tmp_path / "base.yaml").write_text(recipe.to_yaml())
    assert load_recipe(stored, check_files=False).data.mix == recipe.data.mix


def test_a_part_is_a_section_of_its_own_with_what_all_share():
    recipe = load_recipe("base.yaml", [mix(WIKI, "{source: c4, weight: 0.5, max_tokens: 2e6}"), "data.seq_len=32"])
    wiki, c4 = recipe.data.parts()
    assert (wiki.source, wiki.max_tokens, c4.source, c4.max_tokens) == ("wikitext2", None, "c4", 2_000_000)
    assert wiki.mix is None and wiki.seq_len == c4.seq_len == 32
    assert recipe.data.label == "0.5 wikitext2 + 0.5 c4"


@pytest.mark.parametrize(
    ("items", "problem"),
    [
        ([WIKI], "data.mix: the weights 0.5 sum to 0.5, not to 1; change them"),
        ([WIKI, "{source: pydocs, weight: 0.6}"], "data.mix: the weights 0.5 + 0.6 sum to 1.1, not to 1; change them"),
        ([WIKI, "{source: pydocs, weight: -0.5}"], "data.mix[1].weight: -0.5 is not a number above 0; use e.g. 0.5"),
        ([WIKI, "{source: pydocs, weight: much}"], "data.mix[1].weight: 'much' is not a number; the default is 1.0"),
        (
            [WIKI, "{source: pydocs, weightx: 0.5}"],
            "data.mix[1].weightx: unknown key (did you mean weight?); it can be",
        ),
        ([WIKI, WIKI], "data.mix[1].name: wikitext2 is that of data.mix[0] too; set another one"),
        ([WIKI, "{source: pydocs, weight: 0.5, name: a/b}"], "data.mix[1].name: 'a/b' is not made of letters, digits"),
        ([WIKI, "{source: pydoc, weight: 0.5}"], "data.mix[1].source: 'pydoc' is unknown (did you mean pydocs?)"),
        ([WIKI, "{weight: 0.5}"], "data.mix[1].path: null, and data.mix[1].source text reads it; set it to a file"),
        ([WIKI, "{weight: 0.5, path: no/such.txt}"], "data.mix[1].path: no/such.txt does not exist; correct the path"),
        (
            [WIKI, "{source: pydocs, weight: 0.5, max_tokens: 2}"],
            "data.mix[1].max_tokens: 2 does not hold one sequence",
        ),
        (
            [WIKI, "{source: c4, weight: 0.5}"],
            "data.mix[1].max_tokens: null, and c4 (hundreds of gigabytes) is streamed",
        ),
        ([WIKI, "{source: pydocs, weight: 0.5, validation: 2.0}"], "data.mix[1].validation: 2.0 is outside (0, 1)"),
        ([WIKI, "{path: '', weight: 0.5}"], "data.mix[1].path: '' is empty; write a value, or null"),
        ([WIKI, "{path: '${DIR}', weight: 0.5}"], "data.mix[1].path: '${DIR}' holds a ${…}; write the value itself"),
        ([WIKI, "pydocs"], "data.mix: [a mapping, 'pydocs'] is not a list of mappings; use e.g. [{weight: …"),
        ([], "data.mix: [] names no corpus; use e.g. [{source: wikitext2, weight: 1}], or null"),
    ],
)
def test_a_mistake_names_the_item_and_the_key(items, problem):
    with pytest.raises(RecipeError) as caught:
        load_recipe("base.yaml", [mix(*items)])
    assert len(caught.value.problems) == 1 and caught.value.problems[0].startswith(problem), caught.value.problems


def test_keys_of_one_corpus_have_no_effect_beside_a_mixture():
    recipe = load_recipe("base.yaml", [mix(WIKI, "{source: pydocs, weight: 0.5, split: x}"), "data.max_tokens=1e6"])
    assert [text for text in no_effect.warnings(recipe) if text.startswith("data.")] == [
        "data.max_tokens: 1000000 has no effect with data.mix; set max_tokens in its items",
        "data.mix[1].split: x has no effect with data.mix[1].source pydocs",
    ]


def test_messages_about_a_part_have_the_keys_of_the_recipe():
    message = "data.path: 'x' is read with data.source=text, and data.seq_len is 3"
    assert of_part(message, 2) == "data.mix[2].path: 'x' is read with data.mix[2].source=text, and data.seq_len is 3"
