"""Which kind of file somebody gave in place of another, told by its keys: no program knows the classes of all kinds.

tests/test_config.py holds the keys to those classes: who adds a setting at the top level of one adds it here, too.
"""

from collections.abc import Collection, Mapping

_KEYS: Mapping[str, str] = {
    "a study file": "name seed task finetune model plan views objective optimiser schedule batch local aggregation "
    "wire privacy",
    "a simulation file": "study overrides start sites probe probe_every quorum forget_ledgers workers",
    "a site file": "name devices precision micro_batch patients_at_once views_in_turn activation_checkpointing compile "
    "cuda_graphs threads checkpoint_minutes workers privacy policy data labels state ledger state_key cache "
    "cache_limit_gb",
    "a coordinator file": "study out start start_key signing_key sites identity min_sites min_replies wait_s "
    "introduction_s deadline_s round_tries retry_s set_aside_after keep_checkpoints probe probe_every ledgers "
    "forget_ledgers written_by",
    "a fine-tuning file": "name seed task init plan data_root data split allow_empty_masks training inference device "
    "out",
    "a coordinator's server.yaml": "address listen listen_port superlink_port log_mb patience limits",
}
KEYS: Mapping[str, frozenset[str]] = {kind: frozenset(keys.split()) for kind, keys in _KEYS.items()}
"""Kind -> all keys that its files may have at the top level."""


def taken_for(expected: Collection[str], given: Collection[object]) -> tuple[str, str] | None:
    """(what a file is, what was expected) where all its keys are those of another kind and two or more, or all of them,
    are unknown to the one that was expected; None where it is rather a file of that kind with a mistake in it.

    expected: the keys that the kind expected may have. given: those of the file.
    """
    wanted = next((kind for kind, keys in KEYS.items() if keys == frozenset(expected)), None)
    strangers = frozenset(given).difference(expected)
    if wanted is None or not strangers or (len(strangers) < 2 and len(strangers) < len(given)):
        return None
    others = [kind for kind, keys in KEYS.items() if keys.issuperset(given)]  # never `wanted`: it lacks the strangers
    return (" or ".join(others), wanted) if others else None
