"""Every number in the prose of the pages of results is one that was measured."""

import pytest

from tests.docs import claims_benchmarks, claims_mini, claims_quantization, claims_training
from tests.docs.pages import DOCS
from tests.docs.prose import problems, sections

CLAIMS = {
    "training": claims_training,
    "training_mini": claims_mini,
    "benchmarks": claims_benchmarks,
    "quantization": claims_quantization,
}
PROSE = {path.stem: sections(path.read_text(encoding="utf-8")) for path in (DOCS / "results").glob("*.md")}


@pytest.mark.parametrize(("page", "heading"), [(page, heading) for page in PROSE for heading in PROSE[page]])
def test_the_numbers_of_a_section_are_those_measured(page, heading):
    claims = []
    if page in CLAIMS:
        claims += CLAIMS[page].CLAIMS.get(heading, list)()
        claims += CLAIMS[page].FROM_ELSEWHERE.get(heading, ())
    wrong = problems(PROSE[page][heading], claims)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", CLAIMS)
def test_claims_are_of_sections_that_are_there(page):
    assert {*CLAIMS[page].CLAIMS, *CLAIMS[page].FROM_ELSEWHERE} <= set(PROSE[page])


TEXT = "Ours leads by 0.066 and 0.05, by 12 % in relora_ds 0.2.0, and by 0.066 with 16,000 steps."
BOTH, SHARE, LAST = "by 0.066 and 0.05,", "12 %", "and by 0.066 with"


@pytest.mark.parametrize(
    ("claims", "wrong"),
    [
        ([BOTH, SHARE, LAST], []),
        ([BOTH, SHARE], ["no claim for 0.066 in "]),
        ([BOTH, SHARE, "and by 0.067 with"], ["measured: 'and by 0.067 with'; the page: 'and by 0.066 with'"]),
        ([BOTH, SHARE, "and by 0.06"], ["measured: 'and by 0.06'; the page: 'and by 0.066'"]),
        ([BOTH, SHARE, LAST, "ours loses"], ["measured: 'ours loses'; the page: None"]),
    ],
    ids=["all claimed", "a number without a claim", "another number", "a part of a number", "no such words"],
)
def test_numbers_without_a_claim_and_claims_without_a_sentence_are_found(claims, wrong):
    found = problems(TEXT, claims)
    assert len(found) == len(wrong) and all(one.startswith(start) for one, start in zip(found, wrong, strict=True))


def test_tables_code_and_generated_blocks_are_no_prose():
    generated = "<!-- tiny main -->\n0.4\n<!-- end of tiny main -->\n"
    page = f"# A\n0.1\n\n| 0.2 |\n```bash\n# 0.3\n```\n{generated}## B\n- 0.5\n  %\n"
    assert sections(page) == {"A": "0.1", "B": "- 0.5 %"}
