from .attach import attach as attach
from .bank import AdapterBank as AdapterBank
from .combine import combine as combine
from .many import scale as scale, stack as stack
from .sum import weighted_sum as weighted_sum
