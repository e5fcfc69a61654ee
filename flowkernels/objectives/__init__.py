"""What latent-variable models maximise: ELBOs and the estimators of their gradients."""

from flowkernels.objectives.discrete import ESTIMATORS as ESTIMATORS
from flowkernels.objectives.discrete import categorical_entropy as categorical_entropy
from flowkernels.objectives.discrete import elbo_discrete as elbo_discrete
from flowkernels.objectives.discrete import every_latent as every_latent
from flowkernels.objectives.score_function import MovingAverage as MovingAverage
from flowkernels.objectives.score_function import leave_one_out as leave_one_out
from flowkernels.objectives.score_function import score_function_surrogate as score_function_surrogate
