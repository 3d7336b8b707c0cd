"""A model as the draft model of its teacher in speculative decoding: acceptance, tokens per cycle, and speed-up.

In a cycle the draft model writes γ tokens; the teacher checks them in one pass, keeps those before the first that it does not
accept, and writes one itself (Leviathan et al. 2023, arXiv 2211.17192). Whether a draft is accepted depends on how it is
chosen; see `MODES`.
"""

import json
import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmdistill.evaluation.statistics import Array, Draws, interval_text

MOST = 8
"""The longest drafts considered, in tokens."""
MODES = {"sampled": "overlap", "greedy": "truth", "temperature_0": "top1", "unweighted": "collision"}
"""How drafts are chosen and checked, and the quantity that gives the probability of acceptance.

`sampled`: a draft from q, kept with probability min(1, p/q): Σ min(p, q). `greedy`: the draft model's most likely token, kept
with its probability in p: p(argmax q). `temperature_0`: both models write their most likely token: [argmax p = argmax q].
`unweighted`: a draft from q, kept with probability p, as in engines that do not store q: Σ p q.
"""


def draft_sums(values: Mapping[str, Array], model: str, row_N: Array, position_N: Array, count: int) -> dict[str, Array]:
    """What a batch of rows adds to `fidelity` for a model as a draft model.

    Args:
        values: at every completion token, `MODEL QUANTITY` for the quantities of `MODES`.
        model: name of the model.
        row_N: the row of each token.
        position_N: its position in the row's completion.
        count: number of rows.

    Returns:
        For each mode `MODEL MODE cycles`, shape (rows, γ), and `MODEL MODE accepted`, shape (rows, γ, place in the draft), see
        `cycles`.
    """
    accept_RMT = np.zeros((count, len(MODES), int(position_N.max(initial=-1)) + 1))
    for number, quantity in enumerate(MODES.values()):
        accept_RMT[row_N, number, position_N] = values[f"{model} {quantity}"]
    starts_RMG, accepted_RMGK = cycles(accept_RMT, np.bincount(row_N, minlength=count))
    found: dict[str, Array] = {}
    for number, mode in enumerate(MODES):
        found |= {f"{model} {mode} cycles": starts_RMG[:, number], f"{model} {mode} accepted": accepted_RMGK[:, number]}
    return found


def cycles(accept_RMT: Array, lengths_R: Array) -> tuple[Array, Array]:
    """The expected number of cycles in each text, and of drafts that they keep, for γ = 1 to `MOST`.

    The first token is written with the prompt; the first cycle begins after it, and each further one where the last one ended.
    Cycles therefore begin more often where less is accepted, and a mean over all positions would be too high. Cycles that would
    extend beyond the end of the text are left out.

    Args:
        accept_RMT: the probability that a draft at each token is accepted, in each mode.
        lengths_R: tokens of each text.

    Returns:
        Cycles, shape (R, M, γ), and for each position in the draft the number of cycles that keep it, (R, M, γ, K).
    """
    rows, modes, tokens = accept_RMT.shape
    gammas_G, places_K = np.arange(1, MOST + 1), np.arange(MOST)
    is_draft_GK = places_K < gammas_G[:, None]
    # Probability that this many tokens of the current cycle have been accepted; after γ of them the teacher writes.
    state_RMGJ = np.zeros((rows, modes, MOST, MOST + 1))
    state_RMGJ[..., 0] = 1
    starts_RMG, accepted_RMGK = np.zeros((rows, modes, MOST)), np.zeros((rows, modes, MOST, MOST))
    for place in range(1, tokens):
        state_RMGJ[..., 0] *= (place + gammas_G <= lengths_R[:, None])[:, None]
        starts_RMG += state_RMGJ[..., 0]
        drafted_RMGK = state_RMGJ[..., :-1] * is_draft_GK
        kept_RMGK = drafted_RMGK * accept_RMT[:, :, place, None, None]
        accepted_RMGK += kept_RMGK
        begins_RMG = state_RMGJ.sum(axis=-1) - kept_RMGK.sum(axis=-1)
        state_RMGJ[..., 0], state_RMGJ[..., 1:] = begins_RMG, kept_RMGK
    return starts_RMG, accepted_RMGK


def figures(model: str, measured: Mapping[str, Array], draws: Draws) -> dict[str, Any]:
    """For each mode its `acceptance`, the mean over tokens, and `cycles` for each γ that fits into the texts.

    A cycle has γ as `gamma`, its expected tokens with their interval, and `by_place`: how many cycles keep the first draft, the
    first two, … A model that equals the teacher has exactly 1 for `acceptance` and γ + 1 for `cycles` if drafts are sampled or
    both models are at temperature 0.
    """
    found: dict[str, Any] = {}
    for mode in MODES:
        starts_RG, accepted_RGK = measured[f"{model} {mode} cycles"], measured[f"{model} {mode} accepted"]
        entries = [
            {
                "gamma": number + 1,
                **draws.interval(starts_R + accepted_RK.sum(axis=1), starts_R, least=1),
                "by_place": (accepted_RK[:, : number + 1].sum(axis=0) / starts_R.sum()).tolist(),
            }
            for number, (starts_R, accepted_RK) in enumerate(zip(starts_RG.T, accepted_RGK.swapaxes(0, 1), strict=True))
            if starts_R.any()
        ]
        accepted_R = measured[f"{model} {mode} by position"].sum(axis=1)
        found[mode] = {"acceptance": draws.share(accepted_R, measured["tokens"]), "cycles": entries}
    return found


def add_speed_ups(draft: dict[str, Any], decode_ratio: Mapping[str, float] | None) -> None:
    """Add to every cycle of `figures` its speed-up over the teacher alone: tokens / (1 + γ c).

    The cost c is the time per token of the draft model relative to the teacher, from the decoding speeds of both; the teacher's
    pass over the drafts counts as one token. The interval combines the ends of those of the tokens and of the timing rounds.

    Args:
        draft: the entry of a model; `cost` is added.
        decode_ratio: the model's speed over the teacher's, `median`, `low` and `high` of rounds; None if not measured.
    """
    if decode_ratio is None:
        return
    cost = {"median": 1 / decode_ratio["median"], "low": 1 / decode_ratio["high"], "high": 1 / decode_ratio["low"]}
    for mode in MODES:
        for cycle in draft[mode]["cycles"]:
            parts = (("mean", "median"), ("low", "high"), ("high", "low"))
            cycle["speed_up"] = {key: cycle[key] / (1 + cycle["gamma"] * cost[of]) for key, of in parts}
    draft["cost"] = cost


def best_cycles(draft: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The fastest cycle in vLLM at temperature 1, where drafts may be sampled or greedy, and at temperature 0.

    Each with its `temperature`, `mode`, `gamma` and `speed_up`; none if speeds are unknown.
    """
    found = []
    for temperature, modes in ((1, ("sampled", "greedy")), (0, ("temperature_0",))):
        timed = [
            {"temperature": temperature, "mode": mode, "gamma": cycle["gamma"], "speed_up": cycle["speed_up"]}
            for mode in modes
            for cycle in draft[mode]["cycles"]
            if "speed_up" in cycle
        ]
        if timed:
            found.append(max(timed, key=lambda cycle: cycle["speed_up"]["mean"]))
    return found


def advice(best: Mapping[str, Any]) -> str:
    """One of `best_cycles` as a sentence, which says so if a draft model would slow things down."""
    times, ends = interval_text(best["speed_up"], ".2f")
    how = {"sampled": "sampled ", "greedy": "greedy "}.get(best["mode"], "")
    drafts = f"{best['gamma']} {how}draft{'s' if best['gamma'] > 1 else ''} per cycle"
    said = f"At temperature {best['temperature']} the student as a draft model"
    if best["speed_up"]["high"] <= 1:
        return f"{said} would slow the teacher down: even the best, {drafts}, gives {times} times its speed ({ends})."
    if best["speed_up"]["low"] <= 1:
        return f"{said} was not shown to help: the best, {drafts}, gives {times} times the teacher’s speed ({ends})."
    return f"{said} would give the teacher {times} times its speed ({ends}), with {drafts}."


def serve_command(teacher: str, revision: str | None, student: str, best: Mapping[str, Any]) -> str:
    """The shell command that serves a teacher with its draft model in vLLM."""
    drafts = {"model": student, "num_speculative_tokens": best["gamma"], "method": "draft_model"}
    if best["mode"] == "sampled":
        drafts["draft_sample_method"] = "probabilistic"
    command = ["vllm", "serve", teacher, *(["--revision", revision] if revision else [])]
    return shlex.join([*command, "--speculative-config", json.dumps(drafts)])
