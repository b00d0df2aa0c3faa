"""One thread for all tests: their networks are tiny, and two threads wait for each other where others compute too."""

import torch

torch.set_num_threads(1)
