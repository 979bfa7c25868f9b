"""Which arms a label sweep has: runs by method and repeat, random weights, and what starts from nothing.

An arm is first weights and what is done with them. What makes two runs repeats of one method, and two networks the
same, is said here; what an arm's cells share is in `cpc.label_bench`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cpc.encoder_card import read_card
from cpc.foreign import run_config
from cpc.label_bench import Arm, run_fingerprint
from cpc.label_curves import SCRATCH
from cpc.run_folder import MAY_CHANGE, differing_keys

LEARNED_FROM_LABELS = ("Classifier", "Distill")


def grouped_runs(runs: Sequence[str]) -> dict[str, list[str]]:
    """Runs by the name of their method; those whose configurations differ in the seed alone are repeats of one.

    Raises FileNotFoundError and ValueError where one is no finished run, has a name that cannot be a method's, or has
    the configuration and the seed of another.

    Example: two seeds of CPC and one SimCLR give {"CPC": [a, b], "SimCLR": [c]}; another CPC is "CPC 2".
    """
    groups: dict[str, list[str]] = {}
    prints: dict[str, str] = {}
    for run in runs:
        _, card = read_card(run)
        if card.get("classifier") or card.get("method") in LEARNED_FROM_LABELS:
            raise ValueError(
                f"{run} has learned from labels ({card.get('method')}): pass runs that were pre-trained without"
            )
        twin = prints.setdefault(run_fingerprint(run), run)
        if twin != run or runs.count(run) > 1:
            raise ValueError(f"{run} and {twin} are the same run: pass each once")
        method = _method_of(run, card)
        names = [method, *(f"{method} {number}" for number in range(2, len(runs) + 1))]
        name = next(name for name in names if name not in groups or _repeats(groups[name][0], run))
        _check_another_seed(run, groups.setdefault(name, []))
        groups[name].append(run)
    return groups


def _method_of(run: str, card: Mapping[str, Any]) -> str:
    """What a card says, which may come from anyone and becomes a folder's name."""
    method = str(card.get("method", "encoder"))
    if method in (SCRATCH, "random") or not re.fullmatch(r"\w[\w .+-]*", method):
        raise ValueError(
            f"{run} says that its method is {method!r}: in its encoder.json, pass a name of letters and digits that is "
            f"neither {SCRATCH} nor random"
        )
    return method


def _repeats(first: str, other: str) -> bool:
    one, another = (run_config(run)[1] for run in (first, other))
    return bool(one) and set(differing_keys(one, another)) <= {"seed", *MAY_CHANGE}


def _check_another_seed(run: str, repeats: Sequence[str]) -> None:
    seed = run_config(run)[1].get("seed")
    same = [other for other in repeats if run_config(other)[1].get("seed") == seed]
    if same:
        raise ValueError(f"{run} and {same[0]} are of one seed ({seed}), which are no two runs: pass one of them")


def arms_of(
    runs: Sequence[str], *, protocols: Sequence[str], random: Sequence[str] = (), scratch: Sequence[str] = ()
) -> list[Arm]:
    """Every arm, those from scratch first; without "patches" from scratch where the first run's encoder has none.

    The same network from scratch is the first run's; the ordinary one sees images as large as any run's, so that no run
    is held against a network that sees less than it does.

    Args:
        protocols, random, scratch: what pre-trained encoders, untrained ones, and what starts from nothing learn by.

    Raises FileNotFoundError and ValueError where a run is no finished one, and ValueError for "head" where no run has
    one.
    """
    first = runs[0]
    groups = grouped_runs(runs)
    largest = max(runs, key=lambda run: read_card(run)[1]["input"]["image_size"])
    arms = [
        Arm(SCRATCH, protocol, largest if protocol == "cnn" else first)
        for protocol in scratch
        if protocol != "patches" or has_patches(first)
    ]
    arms += [Arm("random", protocol, first) for protocol in random]
    with_head = [run for run in runs if read_card(run)[1].get("head")]
    if "head" in protocols and not with_head:
        raise ValueError("protocols names head, and none of the runs has a projection head: leave it out")
    return arms + [
        Arm(method, protocol, run, repeat)
        for method, of_method in groups.items()
        for repeat, run in enumerate(of_method)
        for protocol in protocols
        if protocol != "head" or run in with_head
    ]


def has_patches(run: str) -> bool:
    """Whether a run's encoder was trained on patches."""
    return bool(read_card(run)[1]["input"].get("patch_size"))


def network_of(encoder: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two networks the same, of a card or of what a cell depends on: architecture, image and patch size."""
    fed = encoder["input"]
    return encoder["architecture"], fed["image_size"], fed.get("patch_size")


def other_networks(groups: Mapping[str, Sequence[str]], encoder: Mapping[str, Any] | None) -> list[str]:
    """The methods whose network is another than this one, or whose run is not there to say."""

    def has_it(run: str) -> bool:
        try:
            return encoder is not None and network_of(read_card(run)[1]) == network_of(encoder)
        except (FileNotFoundError, ValueError):
            return False

    return [method for method, runs in groups.items() if not (runs and has_it(runs[0]))]
