"""The weights of whole models, from and to the safetensors files that `transformers`
has: which tensor is which array, whether all fit, reading each straight to its place,
and writing them back.
"""

from .load import load_weights as load_weights
from .save import save_weights as save_weights
