"""What a model does with data before it is adapted: the inputs of its weights and their
first gradients, gathered in one pass, and the starts and ranks that follow from them.
Starts that need no data are in `_methods`, and what is trained is decided above.
"""

from .calibration import Calibration as Calibration
from .gathering import calibrate as calibrate, Gathered as Gathered
from .ranks import share_out as share_out
