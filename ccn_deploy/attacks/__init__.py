"""Attacks: what they are, Foolbox models over any runtime, and attacks of our own.

:mod:`~ccn_deploy.attacks.spec` is plain data and imports no torch; the rest needs the extra
``train``.
"""

from ccn_deploy.attacks.spec import (
    ATTACKS,
    DEFAULT_ATTACKS,
    DEFAULT_EPSILONS,
    DEFAULT_L2_EPSILONS,
    AttackSpec,
    parse_epsilons,
    settings_of,
    suite,
    title_of,
)

__all__ = [
    "ATTACKS",
    "DEFAULT_ATTACKS",
    "DEFAULT_EPSILONS",
    "DEFAULT_L2_EPSILONS",
    "AttackSpec",
    "parse_epsilons",
    "settings_of",
    "suite",
    "title_of",
]
