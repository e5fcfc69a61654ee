"""Reference models, written only against ops/ and nn/. Every flow has the methods of `Flow`."""

from flowkernels.models.autoregressive import IAF as IAF
from flowkernels.models.autoregressive import MADE as MADE
from flowkernels.models.autoregressive import MAF as MAF
from flowkernels.models.categorical_made import CategoricalMADE as CategoricalMADE
from flowkernels.models.coupling import NICE as NICE
from flowkernels.models.coupling import CouplingFlow as CouplingFlow
from flowkernels.models.coupling import CouplingNSF as CouplingNSF
from flowkernels.models.coupling import RealNVP as RealNVP
from flowkernels.models.dequantized import DequantizedFlow as DequantizedFlow
from flowkernels.models.dequantized import VariationalNoise as VariationalNoise
from flowkernels.models.discrete_vae import DiscreteVAE as DiscreteVAE
from flowkernels.models.flow import Flow as Flow
from flowkernels.models.gaussian_mixture import GaussianMixture as GaussianMixture
from flowkernels.models.image import FlowPP as FlowPP
from flowkernels.models.image import Glow as Glow
from flowkernels.models.image import ImageRealNVP as ImageRealNVP
from flowkernels.models.spline import NSF as NSF
from flowkernels.models.vq_vae import VQVAE as VQVAE
