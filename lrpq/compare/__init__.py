"""Methods side by side on equal terms: same model, tokens, grid, all-in bits and activation order.

terms.py      what all methods of a comparison share
workbench.py  profile, plans, codes and scores of one model and one set of tokens, each computed once
recipes.py    a method as data: allocation, token weights, rounding, correction, what follows rounding
transforms.py transforms of the whole model before it is quantized
codes.py      codes of a whole model
fast.py       `compress --fast` in one process
planned.py    plans that are measured, searched or estimated again
prepared.py   a workbench with the evidence and the plans that its methods need
run.py        rows
memory.py     peak memory of a part
methods.py    the methods under their standard names, with sources
allocation.py from a measure of importance to a plan under a budget
"""
