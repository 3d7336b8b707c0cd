"""The parts of `eval`, `export` and `report`: fidelity, tasks, win rate, cost in vLLM, statistics, plots."""
