"""Settings of every test."""

import torch

# The networks of the tests are tiny: a second thread waits more than it computes, and its sums have another order.
torch.set_num_threads(1)
