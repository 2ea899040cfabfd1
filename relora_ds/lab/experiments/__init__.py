"""The paper's experiments: declared sets of runs, trained one after the other, and what they say together.

suites           suites/*.yaml: the rows of an experiment, each a recipe with overrides
runs             one run of a row: its name, and its result
runner           processes: runs trained, resumed, stopped
run_islands      a run that consists of islands: its directories, its server
budget           what all of it costs, before it starts
suite_report     tables and figures
link_bytes       bytes over the slow link of a run
update_spectra   the singular values of what training added to each weight
"""
