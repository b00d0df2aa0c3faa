"""One thread for all tests: their networks are tiny, and two threads wait for each other where others compute too.

Wide networks are for the long tests: what a method gives on them is held to a reference there, and in a plain run on
``shapes-cnn``, ``shapes-vit``, ``resnet18`` and ``vgg11``.
"""

import re
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

METHODS = Path(__file__).with_name("methods")
WIDE = re.compile(r"\b(densenet121|convnext_tiny|swin_t|vit_b_16)\b")


@pytest.hookimpl(tryfirst=True)  # before what is not asked for is left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        _, bracket, parameters = item.name.partition("[")
        if bracket and METHODS in item.path.parents and WIDE.search(parameters):
            item.add_marker(pytest.mark.soak)
