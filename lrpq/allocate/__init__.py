"""Which layer gets how many bits: multiple-choice knapsack under a hard budget."""
