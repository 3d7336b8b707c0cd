"""The configuration: one module per section, the experiment that contains them, and how it is read from YAML.

Nothing here imports torch, transformers or vLLM, so that a configuration can be read and shown on any machine.
"""

from llmdistill.config.experiment import Experiment
from llmdistill.config.generate import Generate, Score
from llmdistill.config.prompts import Prompts
from llmdistill.config.reading import dump_experiment, explain, keys, load_experiment, overrides_of, read_yaml
from llmdistill.config.section import Section
from llmdistill.config.student import Prune
from llmdistill.config.targets import Targets
from llmdistill.config.teacher import Price, Teacher
from llmdistill.config.train import Train

__all__ = [
    "Experiment",
    "Generate",
    "Price",
    "Prompts",
    "Prune",
    "Score",
    "Section",
    "Targets",
    "Teacher",
    "Train",
    "dump_experiment",
    "explain",
    "keys",
    "load_experiment",
    "overrides_of",
    "read_yaml",
]
