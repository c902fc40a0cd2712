"""Data sets as images in [0, 1] and integer labels: :func:`load_dataset`."""

from ccn_deploy.data.arrays import dataset_from_arrays
from ccn_deploy.data.dataset import Dataset, Images, Labels, Split, check_labels
from ccn_deploy.data.matching import match_classes
from ccn_deploy.data.options import DataOptions, ModelInput
from ccn_deploy.data.registry import DATASETS, DatasetEntry, load_dataset

__all__ = [
    "DATASETS",
    "DataOptions",
    "Dataset",
    "DatasetEntry",
    "Images",
    "Labels",
    "ModelInput",
    "Split",
    "check_labels",
    "dataset_from_arrays",
    "load_dataset",
    "match_classes",
]
