"""The paper's experiments: declared sets of runs, trained one after the other, and what they say together.

suites      suites/*.yaml: the rows of an experiment, each a recipe with overrides
runs        one run of a row: trained, resumed, its result kept
budget      what all of it costs, before it starts
report      tables and figures
spectra     the singular values of what training added to each weight
"""
