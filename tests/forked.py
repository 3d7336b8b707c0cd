"""Commands in processes that have done the imports, so that they can be killed at any moment of what comes after them.

There is one forkserver for all tests of a process: it is started once, with one list of modules.
"""

import multiprocessing

PRELOADED = ["trl", "peft", "llmdistill.cli", "llmdistill.training.trainer", "llmdistill.teachers.transformers"]
PRELOADED += ["llmdistill.teachers.openai", "llmdistill.teachers.anthropic"]
PRELOADED += [
    f"llmdistill.stages.{name}"
    for name in ("generate", "score", "curate", "prune", "train", "rounds", "evaluate", "export", "report")
]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOADED)
