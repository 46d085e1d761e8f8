"""How likely a label is right, from how large its loss is: two normal distributions fitted to all losses.

Losses are brought to [0, 1] by the smallest and the largest; the component of the smaller mean is that of right labels,
and a label is right with the posterior probability of that component:

    w = p(small | l) = s_1 N(l; m_1, v_1) / (s_1 N(l; m_1, v_1) + s_2 N(l; m_2, v_2))
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

# Of scikit-learn's GaussianMixture, as in the code of DivideMix.
OPTIONS = {"max_iter": 10, "tol": 1e-2, "reg_covar": 5e-4}


class LossMixture(nn.Module):
    """The two components; until they are fitted, no label is believed."""

    means: Tensor
    variances: Tensor
    shares: Tensor
    range: Tensor

    def __init__(self) -> None:
        super().__init__()
        first = {"means": (0.0, 1.0), "variances": (1.0, 1.0), "shares": (0.0, 1.0), "range": (0.0, 1.0)}
        for name, values in first.items():
            self.register_buffer(name, torch.tensor(values))

    def fit(self, losses: Tensor) -> None:
        """Fit the components to the losses of all images; waits for an accelerator."""
        from sklearn.exceptions import ConvergenceWarning  # heavy, and only this needs it
        from sklearn.mixture import GaussianMixture

        self.range.copy_(torch.stack([losses.min(), losses.max()]))
        mixture = GaussianMixture(2, random_state=0, **OPTIONS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # ten iterations are what is asked for
            mixture.fit(self._between(losses).double().cpu().unsqueeze(1).numpy())
        order = mixture.means_.ravel().argsort()
        found = {"means": mixture.means_, "variances": mixture.covariances_, "shares": mixture.weights_}
        for name, values in found.items():
            getattr(self, name).copy_(torch.from_numpy(values.ravel()[order]))

    def right(self, losses: Tensor) -> Tensor:
        """Return w."""
        distance = self._between(losses).unsqueeze(1) - self.means
        log_joint = self.shares.log() - 0.5 * self.variances.log() - 0.5 * distance.square() / self.variances
        return log_joint.softmax(1)[:, 0]

    def _between(self, losses: Tensor) -> Tensor:
        smallest, largest = self.range[0], self.range[1]
        return (losses.to(self.range.dtype) - smallest) / (largest - smallest).clamp_min(1e-12)
