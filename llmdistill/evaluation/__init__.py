"""What `eval` and `report` are made of: fidelity, tasks, the judge's verdicts, cost in vLLM, statistics, plots."""
