// Everything that runs element by element inside the kernels.
#pragma once
#include "common/activations.h"
#include "common/affine.h"
#include "common/half.h"
#include "common/math.h"
#include "common/scales.h"
