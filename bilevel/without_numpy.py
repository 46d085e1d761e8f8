"""Import torch where numpy is not installed: nothing here needs it, and torch's word on it is no error of the user's.

Torch alone warns once, while it is imported, that it found no numpy; under ``python -W error`` that ends the import of
whatever imports torch first. This module comes first in the package for that reason and has no other content.
"""

import warnings

with warnings.catch_warnings():
    # Only an absent numpy: one that is there and fails (built for another version, say) is still warned about.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy: No module named 'numpy'", UserWarning)
    import torch as torch
