"""What is written in a recipe is what its fields hold, in files and in overrides, whatever YAML makes of it."""

import pytest
import yaml

from relora_ds.config import Recipe, load_recipe, read_recipe
from relora_ds.config.fields import fields_of

PATHS = [key for key, field in fields_of(Recipe).items() if field.is_path]

# Plain words to which YAML gives another type, and characters that mean something to it.
RETYPED = (
    "2024_01_02",
    "2024-01-02",
    "0123",
    "010",
    "0x10",
    "0o17",
    "1e3",
    "1E-8",
    "1_000",
    "12:30:45",
    "1:20",
    "no",
    "yes",
    "on",
    "off",
    "y",
    "True",
    "FALSE",
    "None",
    ".5",
    "1.",
    ".inf",
    ".nan",
    "nan",
    "=",
    "2001-12-14t21:59:43Z",
)
SPECIAL = (
    "runs/exp #2",
    "#1",
    "a: b.txt",
    "x:",
    "- x",
    "?",
    "|",
    ">",
    "*.txt",
    "&x",
    "!x.txt",
    "%x",
    "@x",
    "`x`",
    "{a,b}.txt",
    "[x].txt",
    "a,b",
    "[a.txt,b.txt]",
    "x=y.txt",
    "'x' y",
    'x "y"',
    "C:\\x\\new.txt",
    "a  b",
    " x",
    "x ",
    "$HOME/x",
    "über/東京🙂",
    "a'b",
    "---",
    "...",
    "a\u2028b",
    "it''s",
    "a" * 200 + " b",
)


def field(recipe: Recipe, key: str) -> object:
    for part in key.split("."):
        recipe = getattr(recipe, part)
    return recipe


def read(*overrides: str, recipe: object = "tiny") -> Recipe:
    found, problems = read_recipe(recipe, overrides, check_files=False)
    assert problems == []
    return found


def problems_of(*overrides: str, recipe: object = "tiny") -> list[str]:
    return read_recipe(recipe, overrides, check_files=False)[1]


@pytest.fixture
def write(tmp_path):
    """Write a recipe that extends tiny."""

    def write(text: str):
        (tmp_path / "r.yaml").write_text(f"extends: tiny\n{text}\n", encoding="utf-8")
        return tmp_path / "r.yaml"

    return write


@pytest.mark.parametrize("text", RETYPED + SPECIAL)
def test_an_override_of_text_is_taken_as_it_is(text):
    keys = ("run_dir", "data.path", "data.config", "data.text_column", "data.tokenizer")
    recipe = read("data.source=text", *(f"{key}={text}" for key in keys))
    assert [field(recipe, key) for key in keys] == [text] * len(keys)


@pytest.mark.parametrize("text", RETYPED)
def test_plain_words_in_a_file_stay_text(write, text):
    recipe = read(
        recipe=write(f"run_dir: {text}\ndata: {{source: text, config: {text}, tokenizer: '{text}', path: \"{text}\"}}")
    )
    assert {recipe.run_dir, recipe.data.config, recipe.data.tokenizer, recipe.data.path} == {text}


@pytest.mark.parametrize("text", RETYPED + SPECIAL + ("null", "1e400", "auto", "false"))
def test_text_survives_a_stored_recipe(tmp_path, text):
    recipe = read(f"run_dir='{text.replace(chr(39), 2 * chr(39))}'")
    for part, name in (
        (recipe.data, "path"),
        (recipe.data, "validation"),
        (recipe.data, "split"),
        (recipe.data, "tokenizer"),
        (recipe.data, "text_column"),
        (recipe, "init_from"),
    ):
        setattr(part, name, text)
    recipe.relora.trainable_modules = [text, "null", "on"]
    (tmp_path / "r.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    stored, _ = read_recipe(tmp_path / "r.yaml", check_files=False)
    assert stored == recipe and stored.data.validation == recipe.data.validation


def test_null_and_quotes():
    for null in ("null", "~", ""):
        recipe = read(f"data.tokenizer={null}", f"data.path={null}", f"run_dir={null}", f"eval.every={null}")
        assert recipe.data.tokenizer is recipe.data.path is recipe.eval.every is None and recipe.run_dir == "runs/tiny"
    recipe = read("data.source=text", "data.tokenizer='null'", 'data.path="a \\u00e9"', "data.config='it''s'")
    assert (recipe.data.tokenizer, recipe.data.path, recipe.data.config) == ("null", "a é", "it's")
    assert problems_of("data.split=null") == ["data.split: null is not text; the default is 'train'"]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("0.05", 0.05),
        ("1e-2", 0.01),
        (".5", 0.5),
        ("null", None),
        ("no", "no"),
        ("5%", "5%"),
        ("2024_01", "2024_01"),
        ("'0.05'", "0.05"),
        ("held out.txt", "held out.txt"),
    ],
)
def test_validation_is_a_number_or_a_path(write, written, value):
    assert read(f"data.validation={written}").data.validation == value
    assert read(recipe=write(f"data: {{validation: {written}}}")).data.validation == value


@pytest.mark.parametrize(
    ("written", "value"),
    [("auto", "auto"), ("false", False), ("False", False), ("no", False), ("2024_01_02", "2024_01_02"), ("'no'", "no")],
)
def test_resume_is_false_or_a_path(written, value):
    assert read(f"resume={written}").resume == value


def test_names_in_a_list_stay_names(write):
    assert read("relora.target_modules=[on, q_proj, 1, 0x10]").relora.target_modules == ["on", "q_proj", "1", "0x10"]
    recipe = read(recipe=write("relora:\n  trainable_modules:\n  - no\n  - 2024-01-02\n  - 'x y'"))
    assert recipe.relora.trainable_modules == ["no", "2024-01-02", "x y"]
    assert read("relora.trainable_modules=null").relora.trainable_modules is None
    for lost in ("[a, b] # c", "[a] b", "[a, *b]", "[a"):
        assert problems_of(f"relora.trainable_modules={lost}")[0].startswith("relora.trainable_modules: ")
        assert problems_of(f"relora.target_modules={lost}")[0].startswith("relora.target_modules: ")


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("seed", "010", 10),
        ("seed", "1e1", 10),
        ("seed", "0x10", 16),
        ("seed", "'7'", 7),
        ("train.tokens", "1.2e9", 1_200_000_000),
        ("train.tokens", "1_000_000", 1_000_000),
        ("optim.lr", "1e-3", 1e-3),
        ("optim.lr", "'.001'", 1e-3),
        ("relora.lora_alpha", "1_0.5", 10.5),
        ("compile", "off", False),
        ("compile", "YES", True),
    ],
)
def test_numbers_are_decimal_and_exact(write, key, written, value):
    section, _, leaf = key.rpartition(".")
    for recipe in (
        read_recipe("tiny", [f"{key}={written}"])[0],
        read_recipe(write(f"{section}: {{{leaf}: {written}}}" if section else f"{leaf}: {written}"))[0],
    ):
        assert field(recipe, key) == value and type(field(recipe, key)) is type(value)


def test_an_integer_is_not_rounded():
    assert read_recipe("tiny", ["train.tokens=1e23"])[0].train.tokens == 10**23


@pytest.mark.parametrize(
    "override",
    [
        "seed=1:20",
        "seed=1e999999999",
        "seed=1.5",
        "seed=5 # five",
        "seed=1,000",
        "seed=true",
        "seed=[1]",
        "seed=",
        "compile=2",
        "compile=[true]",
        "optim.lr=1e-3,",
        "optim.lr=ten",
        "optim.betas=(0.9, 0.95)",
        "optim.betas=[0.9, [1]]",
        "optim.betas=0.9",
        "train.steps=20k",
    ],
)
def test_what_is_no_number_is_refused_with_its_text(override):
    key, _, text = override.partition("=")
    assert any(
        p.startswith(f"{key}: ") and "; the default is" in p and text.strip("[]' ")[:3] in p
        for p in problems_of(override)
    )


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "${env:HOME}/x", "a${b}", "${relora.r}", "\\${x}", "${"])
def test_variables_are_refused_everywhere(write, monkeypatch, text):
    monkeypatch.setenv("HOME", "/secret")
    for recipe, overrides in (
        ("tiny", [f"run_dir={text}"]),
        ("tiny", [f"relora.trainable_modules=['{text}']"]),
        (write(f"data: {{path: '{text}'}}"), []),
        (write(f"optim: {{lr: '{text}'}}"), []),
    ):
        found = problems_of(*overrides, recipe=recipe)
        assert len(found) == 1 and "recipes resolve no variables" in found[0] and '="$NAME"' in found[0]
        assert "/secret" not in found[0]


def test_home_directories_are_expanded_once_for_all(tmp_path, monkeypatch, write):
    monkeypatch.setenv("HOME", "/home/me")
    for key in PATHS:
        assert field(read_recipe("tiny", [f"{key}=~/x"], check_files=False)[0], key) == "/home/me/x"
    recipe, _ = read_recipe(write("run_dir: ~/runs/x\ndata: {source: text, path: ~root/x}"), check_files=False)
    assert recipe.run_dir == "/home/me/runs/x" and not recipe.data.path.startswith("~")
    assert read("data.config=~/x").data.config == "~/x"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_recipe("~/r.yaml", ["run_dir=x"], check_files=False).run_dir == "x"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("seed: 1\nseed: 2", "line 3: duplicate key seed"),
        ("optim: {lr: 1}\noptim: {eps: 1}", "line 3: duplicate key optim"),
        ("optim: {lr: 1, lr: 2}", "duplicate key lr"),
        ("optim: {lr: 1}\noptim.lr: 2", "line 3: duplicate key optim.lr"),
        ("run_dir: !!python/object/apply:os.system ['touch ran']", "python/object/apply:os.system is not read"),
        ("relora: {target_modules: [!!python/name:os.system '']}", "python/name:os.system is not read"),
        ("run_dir: !env HOME", "the tag !env is not read"),
        ("<<: {seed: 4}", "the merge key << is not read; use extends"),
        ("? [a]\n: 1", "a key is a list"),
        ("relora: &x {r: 8}\nlora: *x", "an alias stands for a list or a mapping"),
        ("seed: " + "[" * 5000, "nested too deeply"),
        ("run_dir: a\n---\nrun_dir: b", "expected a single document"),
    ],
)
def test_files_that_are_refused(write, tmp_path, monkeypatch, text, reason):
    monkeypatch.chdir(tmp_path)
    (problem,) = problems_of(recipe=write(text))
    assert "r.yaml is not a readable YAML recipe" in problem and reason in problem
    assert not (tmp_path / "ran").exists()


def test_aliases_of_aliases_cost_nothing(write):
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    (problem,) = problems_of(recipe=write("a0: &a0 [x]\n" + "\n".join(levels)))
    assert "an alias stands for a list" in problem and len(problem) < 20_000
    assert read(recipe=write("optim: {lr: &lr 2e-3, warm_start_lr: *lr}")).optim.warm_start_lr == 2e-3


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "r.yaml"
    for content, fine in (
        (b"\xef\xbb\xbfextends: tiny\nseed: 7\n", True),
        ("extends: tiny\n".encode("utf-16"), True),
        ("extends: tiny\nrun_dir: résumé\n".encode("latin-1"), False),
        (b"run_dir: a\0b\n", False),
    ):
        path.write_bytes(content)
        assert (problems_of(recipe=path) == []) is fine


def test_a_mapping_where_a_value_belongs(write):
    assert problems_of(recipe=write("seed: {a: 1}")) == ["seed: a mapping is not an integer; the default is 0"]
    assert problems_of("relora={r: 8}")[0].startswith("relora: '{r: 8}' where a section of keys is expected")
    assert read("relora=null") == read()


def test_the_stored_recipe_is_plain_yaml():
    recipe = load_recipe("tiny", ["run_dir=0123", "data.config=no"])
    values = yaml.safe_load(recipe.to_yaml())  # as other tools read it
    assert values["run_dir"] == "0123" and values["data"]["config"] == "no" and values["compile"] is False
