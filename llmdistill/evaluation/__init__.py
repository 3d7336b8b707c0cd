"""What `eval`, `export` and `report` are made of: fidelity, tasks, win rate, cost in vLLM, statistics, plots."""
