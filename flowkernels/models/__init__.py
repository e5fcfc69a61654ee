"""Reference models, written only against ops/ and nn/. Every flow has the methods of `Flow`."""

from flowkernels.models.autoregressive import IAF as IAF
from flowkernels.models.autoregressive import MADE as MADE
from flowkernels.models.autoregressive import MAF as MAF
from flowkernels.models.discrete_vae import DiscreteVAE as DiscreteVAE
from flowkernels.models.flow import Flow as Flow
from flowkernels.models.gaussian_mixture import GaussianMixture as GaussianMixture
from flowkernels.models.vq_vae import VQVAE as VQVAE
