// CUDA kernels as C++, for an extension whose device is the emulator: those of the loss.

// Of a batch of pieces only those whose turn comes are read and used, under one condition; GCC does not see that.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "../../csrc/cuda/bundles.cu"
#include "../../csrc/cuda/forward.cu"
#include "../../csrc/cuda/forward_grad.cu"
#include "../../csrc/cuda/plan.cu"
