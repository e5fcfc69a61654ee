"""Reference models, written only against ops/ and nn/. Every flow has the methods of `Flow`."""

from flowkernels.models.autoregressive import IAF as IAF
from flowkernels.models.autoregressive import MADE as MADE
from flowkernels.models.autoregressive import MAF as MAF
from flowkernels.models.flow import Flow as Flow
