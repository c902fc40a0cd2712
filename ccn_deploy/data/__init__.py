"""Data sets as images in [0, 1] and integer labels: :func:`load_dataset`."""

from ccn_deploy.data.dataset import Dataset, Images, Labels, Split
from ccn_deploy.data.registry import DATASETS, load_dataset

__all__ = ["DATASETS", "Dataset", "Images", "Labels", "Split", "load_dataset"]
