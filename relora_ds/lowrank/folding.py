"""When a layer multiplies with `W + s·B·A`, formed for each micro-batch, and when with W beside a side branch.

FLOPs of forward and backward together, for W `[m, n]` = `[out, in]`, rank r, and b tokens in a micro-batch:

                        both factors train          B alone
    separate            b (4mn + 6rm + 6rn)         b (4mn + 6rm + 4rn)
    folded              b (4mn + 4rm + 4rn) + 4rmn  b (4mn + 2rm + 2rn) + 4rmn

Folding drops the products `h·Bᵀ` of forward and `gB·A` of backward (where B alone trains, also `gB = g·B`), and forms
`B·A` twice. It takes fewer FLOPs from `b = 2mn / (m + n)` tokens on, or `2mn / (2m + n)`: whatever r is. Both ways move
memory beside that, of sizes in the same proportion: folding reads W and writes the sum, and the side branch reads and
writes the output and the input's gradient once more. So time is equal near the same b. `auto` asks for half as many
tokens again, that folding is faster and not just equal.
"""

MARGIN = 3 / 2
_SIDES = {  # (folded, both factors train) -> multiples of rm and rn for a token
    (False, True): (6, 6),
    (False, False): (6, 4),
    (True, True): (4, 4),
    (True, False): (2, 2),
}


def folds_from(out_features: int, in_features: int, *, trains_A: bool) -> int:
    """Return the tokens of a micro-batch from which on `auto` folds."""
    m, n = out_features, in_features
    return round(MARGIN * 2 * m * n / (m + n if trains_A else 2 * m + n))


def flops(out_features: int, in_features: int, r: int, tokens: int, *, trains_A: bool, folded: bool) -> int:
    """Return the FLOPs of a layer's forward and backward for so many tokens."""
    m, n = out_features, in_features
    of_m, of_n = _SIDES[folded, trains_A]
    return tokens * (4 * m * n + r * (of_m * m + of_n * n)) + folded * 4 * r * m * n
