// CUDA kernels as C++, for an extension whose device is the emulator: all but those of the loss, so that two compilers
// take about as long.

// Of a batch of pieces only those whose turn comes are read and used, under one condition; GCC does not see that.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "../../csrc/cuda/backward.cu"
#include "../../csrc/cuda/divergence.cu"
#include "../../csrc/cuda/errors.cu"
#include "../../csrc/cuda/picks.cu"
#include "../../csrc/cuda/scale.cu"
#include "../../csrc/cuda/shards.cu"
#include "../../csrc/cuda/sums.cu"
