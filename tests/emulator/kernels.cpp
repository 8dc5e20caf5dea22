// The CUDA kernels as C++, for an extension whose device is the emulator.
#include "../../csrc/cuda/backward.cu"
#include "../../csrc/cuda/errors.cu"
#include "../../csrc/cuda/forward.cu"
#include "../../csrc/cuda/plan.cu"
#include "../../csrc/cuda/scale.cu"
#include "../../csrc/cuda/sums.cu"
