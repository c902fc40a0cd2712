"""The numbers of the paper, table by table: Ranjan et al., arXiv:1712.00699.

By the name of a table, then by the family of data its half is about, then by row: one number a
column, in the columns' order, as printed. Accuracies and success are in percent. In the table on
ImageNet the robustness is in percent too; elsewhere it is a ratio (equation 9).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Family = Literal["mnist", "cifar10", "imagenet"]
"""Whose images a network is made for: 28x28 in one channel, 32x32 or 224x224 in three."""

Numbers = Mapping[str, tuple[float, ...]]

PAPER: Mapping[str, Mapping[Family, Numbers]] = {
    # Without an attack, then FGSM at four epsilons.
    "table1": {
        "mnist": {
            "SM": (99.50, 92.61, 63.71, 31.76, 19.39),
            "LS": (99.53, 95.62, 85.13, 44.25, 15.57),
            "BReLU": (99.54, 95.29, 74.83, 42.51, 19.41),
            "L2SM": (99.48, 94.51, 79.68, 60.32, 45.16),
            "CCN": (99.50, 96.99, 91.64, 81.38, 60.65),
            "CCN+LS": (99.43, 97.26, 93.68, 89.73, 75.95),
        },
        "cifar10": {
            "SM": (91.14, 60.82, 34.62, 14.30, 8.57),
            "LS": (91.03, 66.7, 58.4, 54.07, 51.05),
            "BReLU": (90.87, 61.49, 35.02, 18.01, 13.73),
            "L2SM": (91.37, 70.58, 65.39, 63.71, 62.59),
            "CCN": (90.54, 73.72, 71.47, 69.65, 66.23),
            "CCN+LS": (90.51, 80.93, 79.2, 76.8, 71.38),
        },
    },
    # DeepFool, at five largest relative perturbations d.
    "table2": {
        "mnist": {
            "SM": (93.24, 63.22, 18.73, 1.89, 0.53),
            "LS": (96.85, 92.2, 88.12, 82.05, 70.08),
            "BReLU": (96.15, 84.33, 70.13, 57.25, 45.5),
            "L2SM": (96.5, 88.22, 75.94, 59.47, 40.31),
            "CCN": (97.06, 92.18, 83.46, 69.25, 48.54),
            "CCN+LS": (97.76, 95.42, 92.43, 88.65, 84.01),
        },
        "cifar10": {
            "SM": (5.73, 5.72, 5.72, 5.72, 5.72),
            "LS": (57.33, 43.93, 31.77, 21.89, 14.6),
            "BReLU": (22.44, 15.49, 10.48, 7.29, 6.37),
            "L2SM": (66.63, 56.93, 47.89, 38.52, 28.85),
            "CCN": (73.17, 71.78, 70.24, 68.13, 64.02),
            "CCN+LS": (80.8, 79.38, 78.08, 76.43, 74.22),
        },
    },
    # DeepFool's robustness rho_adv.
    "table3": {
        "mnist": {
            "SM": (0.225,),
            "LS": (0.571,),
            "BReLU": (0.493,),
            "L2SM": (0.441,),
            "CCN": (0.479,),
            "CCN+LS": (0.827,),
        },
        "cifar10": {
            "SM": (0.014,),
            "LS": (0.185,),
            "BReLU": (0.057,),
            "L2SM": (0.285,),
            "CCN": (0.549,),
            "CCN+LS": (0.625,),
        },
    },
    # As table 1, networks trained on FGSM's images too.
    "table4": {
        "mnist": {
            "SM": (99.49, 96.51, 98.67, 99.15, 96.06),
            "LS": (99.45, 98.4, 98.77, 99.31, 98.79),
            "BReLU": (99.43, 96.79, 98.93, 99.42, 97.12),
            "L2SM": (99.47, 96.88, 98.7, 99.32, 84.03),
            "CCN": (99.44, 98.18, 98.71, 99.09, 96.9),
            "CCN+LS": (99.48, 98.65, 98.8, 98.93, 94.13),
        },
        "cifar10": {
            "SM": (83.8, 71.56, 67.18, 71.46, 43.09),
            "LS": (83.28, 77.68, 69.07, 52.13, 34.04),
            "BReLU": (85.37, 72.93, 67.08, 80.73, 31.01),
            "L2SM": (84.8, 73.08, 68.31, 74.95, 49.64),
            "CCN": (87.08, 73.27, 75.8, 76.78, 61.97),
            "CCN+LS": (87.17, 76.68, 77.53, 77.66, 70.17),
        },
    },
    # Without an attack, FGSM at four epsilons, then DeepFool's robustness in percent.
    "table5": {
        "imagenet": {
            "SM": (60.52, 47.19, 25.72, 17.02, 10.14, 0.1325),
            "LS": (63.80, 58.84, 43.17, 32.55, 20.21, 0.2951),
            "BReLU": (67.08, 53.05, 27.35, 17.50, 10.75, 0.1463),
            "L2SM": (68.78, 56.66, 33.74, 22.95, 13.92, 0.1911),
            "CCN": (68.00, 51.43, 28.57, 19.54, 12.68, 0.1439),
            "CCN+LS": (66.64, 53.22, 36.63, 29.90, 23.53, 0.4027),
        },
    },
    # FGSM from a substitute network, at four epsilons.
    "table6": {
        "mnist": {
            "SM": (98.49, 87.44, 55.41, 32.84),
            "LS": (98.89, 91.12, 52.53, 29.28),
            "BReLU": (98.90, 91.96, 66.45, 39.44),
            "L2SM": (98.99, 93.37, 56.67, 26.63),
            "CCN": (99.15, 96.76, 77.27, 28.19),
            "CCN+LS": (99.24, 97.33, 84.14, 32.94),
        },
    },
    # FGSM at 0.3: rows are attacked, columns are what the images were crafted on.
    "table7": {
        "mnist": {
            "SM": (31.76, 61.41, 54.22, 77.88, 91.22, 93.84),
            "LS": (49.48, 44.25, 53.63, 80.47, 91.76, 94.69),
            "BReLU": (52.62, 66.43, 42.51, 79.69, 90.82, 93.77),
            "L2SM": (52.01, 64.93, 58.91, 60.32, 90.65, 93.59),
            "CCN": (64.15, 75.7, 66.55, 82.7, 81.38, 93.53),
            "CCN+LS": (70.18, 80.83, 71.49, 85.29, 90.49, 89.73),
        },
    },
    # The same at 8/255.
    "table8": {
        "cifar10": {
            "SM": (14.30, 59.14, 33.63, 67.13, 77.77, 82.91),
            "LS": (31.16, 54.07, 33.28, 67.26, 77.84, 83.11),
            "BReLU": (33.63, 59.65, 18.01, 67.96, 77.85, 82.95),
            "L2SM": (32.59, 59.95, 35.01, 63.71, 77.76, 82.78),
            "CCN": (41.33, 63.6, 42.37, 69.63, 69.65, 80.53),
            "CCN+LS": (41.48, 63.48, 42.29, 69.98, 73.74, 76.8),
        },
    },
    # As table 1.
    "table9": {
        "mnist": {
            "SM": (99.50, 92.61, 63.71, 31.76, 19.39),
            "BN": (99.58, 88.48, 30.72, 11.20, 9.24),
            "LRN": (99.28, 88.59, 52.52, 25.61, 13.21),
            "CCN": (99.50, 96.99, 91.64, 81.38, 60.65),
            "CCN+LS": (99.43, 97.26, 93.68, 89.73, 75.95),
        },
        "cifar10": {
            "SM": (91.14, 60.82, 34.62, 14.30, 8.57),
            "BN": (92.34, 59.47, 40.63, 26.7, 16.58),
            "LRN": (91.33, 60.68, 34.82, 14.99, 9.08),
            "CCN": (90.54, 73.72, 71.47, 69.65, 66.23),
            "CCN+LS": (90.51, 80.93, 79.2, 76.8, 71.38),
        },
    },
    # C&W: mean L2 distance, and success.
    "table11": {
        "mnist": {
            "SM": (1.393, 100.0),
            "LS": (1.626, 100.0),
            "BReLU": (1.473, 100.0),
            "L2SM": (1.453, 100.0),
            "CCN": (1.449, 100.0),
            "CCN+LS": (2.079, 96.54),
        },
    },
    "table12": {
        "cifar10": {
            "SM": (0.277, 100.0),
            "LS": (0.413, 100.0),
            "BReLU": (0.312, 99.13),
            "L2SM": (0.717, 94.26),
            "CCN": (0.352, 99.95),
            "CCN+LS": (0.471, 99.08),
        },
    },
    # Without an attack and FGSM at 0.3, one compact layer at a time.
    "table13": {
        "mnist": {
            "none": (99.50, 31.76),
            "conv1": (99.50, 44.38),
            "conv2": (99.51, 42.34),
            "conv3": (99.50, 39.80),
            "conv4": (99.54, 39.04),
            "fc1": (99.58, 44.19),
            "fc2": (99.57, 58.71),
            "fc3": (99.48, 60.32),
        },
    },
}

LAYERS: Mapping[Family, tuple[str, ...]] = {
    "mnist": (
        *("32 filters (3x3)", "32 filters (3x3)", "2x2 max-pool"),
        *("64 filters (3x3)", "64 filters (3x3)", "2x2 max-pool"),
        *("200 units", "200 units", "10 units"),
    ),
    "cifar10": (
        *("64 filters (3x3)", "128 filters (3x3)", "2x2 max-pool"),
        *("256 filters (3x3)", "256 filters (3x3)", "2x2 max-pool"),
        *("512 filters (3x3)", "512 filters (3x3)", "2x2 max-pool"),
        *("512 filters (3x3)", "512 filters (3x3)", "2x2 max-pool"),
        *("512 units", "512 units", "10 units"),
    ),
}
"""The networks of table 10, layer by layer."""

TRAINING: Mapping[Family, str] = {
    "mnist": "50 epochs on 60,000 images",
    "cifar10": "200 epochs on 50,000 images",
    "imagenet": "1,200,000 images",
}
"""How the paper's networks were trained, as far as it says."""
