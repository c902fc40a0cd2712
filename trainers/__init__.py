"""Recipes and the training loop: :func:`train` a :class:`TrainConfig` into a run directory."""

from ccn_deploy.trainers.adversary import Adversary
from ccn_deploy.trainers.config import TrainConfig
from ccn_deploy.trainers.events import EpochEnded, Event, Skipped, Started, Stepped
from ccn_deploy.trainers.recipes import RECIPES, Recipe, recipe_named
from ccn_deploy.trainers.training import train

__all__ = [
    "RECIPES",
    "Adversary",
    "EpochEnded",
    "Event",
    "Recipe",
    "Skipped",
    "Started",
    "Stepped",
    "TrainConfig",
    "recipe_named",
    "train",
]
