"""The step of `curate` that keeps the best answers to a prompt; the others are its losers, each with its score.

A prompt's answers are those that stand one after the other in the dataset, as `generate.samples` writes them.
"""

import itertools
import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from llmdistill.config.curate import BestOf
from llmdistill.curation import judge
from llmdistill.curation.steps import Check, CurationStep, Failed, StepContext


def inputs(settings: BestOf, key: str) -> dict[str, str]:
    """The judge's rubric and models, if there is a judge.

    Raises:
        InputError: one is missing, or the rubric cannot be used.
    """
    return judge.inputs(settings.judge, f"{key}.judge") if settings.judge else {}


def best_of(settings: BestOf, context: StepContext) -> Check:
    """By rank among the answers to the same prompt; among equals, the first counts as better."""
    scored = _likelihoods if settings.judge is None else judge.scores_of(settings.judge, context, f"{context.key}.judge")
    log = context.closing.enter_context(context.log.open("w", encoding="utf-8"))

    def check(rows: pa.Table) -> Iterator[str | None]:
        scores, ids = list(scored(rows)), rows["id"].to_pylist()
        prompts = rows["prompt"].to_pylist()
        for _, group in itertools.groupby(range(len(rows)), key=lambda place: prompts[place] or place):
            places = list(group)
            known = [(-score, place) for place in places if not isinstance(score := scores[place], Failed)]
            ranked = [place for _, place in sorted(known)]
            for place in places:
                score = scores[place]
                if isinstance(score, Failed) or place in ranked[: settings.keep]:
                    yield score if isinstance(score, Failed) else None
                    continue
                best = ranked[0]
                pair = {"chosen": ids[best], "rejected": ids[place], "chosen_score": scores[best], "rejected_score": score}
                log.write(json.dumps(pair) + "\n")
                yield f"score {score:.3f}, row {ids[best]} has {scores[best]:.3f}"

    return check


def _likelihoods(rows: pa.Table) -> Iterator[float | Failed]:
    """The teacher's mean log-probability of the answer's tokens, at temperature 1, over those where it is known."""
    for logprobs in rows["token_logprobs"]:
        known = logprobs.values.to_numpy(zero_copy_only=False) if len(logprobs) else np.empty(0)
        known = known[~np.isnan(known)]
        mean = float(np.mean(known)) if len(known) else float("nan")
        yield mean if np.isfinite(mean) else Failed("no log-probabilities of its tokens are known")


STEP = CurationStep(best_of, inputs)
