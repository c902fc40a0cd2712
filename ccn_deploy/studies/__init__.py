"""The paper's experiments, run again: what it published beside what these networks do."""
