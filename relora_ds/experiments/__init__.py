"""The paper's experiments: what runs say together.

    spectra     singular values of the updates that runs made to their weights (Figures 3 and 4)
"""
