from . import (
    concatenate as concatenate,
    gather as gather,
    products as products,
    views as views,
)
from .contraction import contract as contract
from .convolution import channels_first as channels_first, convolve as convolve
from .gather import take as take
from .products import (
    Label as Label,
    Labels as Labels,
    NotFactored as NotFactored,
    portable as portable,
    Precision as Precision,
    product as product,
    RANK as RANK,
)
from .views import explicit_sharding as explicit_sharding
