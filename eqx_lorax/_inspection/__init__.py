"""Looking inside trained adapters: the singular values of what each has learned, what
quantising has rounded away, tables and pictures of them, and what the report of a bug
needs. Nothing here changes a model.
How much of a model is trained, and the memory that takes, is in `_training`.
"""

from .info import Info as Info, info as info
from .ranks import allocate_ranks as allocate_ranks
from .rounding import (
    quantisation_error as quantisation_error,
    QuantisationError as QuantisationError,
    TargetError as TargetError,
)
from .spectra import spectra as spectra
from .spectrum import Spectra as Spectra, TargetSpectrum as TargetSpectrum
