// The way to the device: the only file that includes the CUDA runtime, or the emulator in its place.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "../operands.h"
#include "plan.h"

#ifdef CE_EMULATE
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#define CE_DEVICE __device__ __forceinline__
#ifdef CE_EMULATE
#define CE_UNROLL
#else
#define CE_UNROLL _Pragma("unroll")
#endif

namespace ce::cuda {

struct Grid {
  int64_t blocks;
  int threads;         // of a block
  int cluster = 1;     // neighbouring blocks that run together
  int64_t shared = 0;  // bytes
};

constexpr int64_t kMaxBlocks = INT32_MAX;

#ifdef CE_EMULATE

inline Device current_device() {
  const emulator::Properties& properties = emulator::properties();
  return {properties.multiprocessors, properties.shared_memory, properties.max_cluster};
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, Stream, const Arguments&... arguments) {
  emulator::launch(__PRETTY_FUNCTION__, dim3(static_cast<unsigned>(grid.blocks)), dim3(grid.threads), grid.cluster,
                   grid.shared, [&] { kernel(arguments...); });
}

CE_DEVICE void* shared_memory() {
  return emulator::dynamic_shared();
}

#define CE_CLUSTERS

CE_DEVICE float divide_approx(float n, float d) {
  return n / d;
}

CE_DEVICE float exp2_approx(float x) {
  const float result = std::exp2(x);
  return result < std::numeric_limits<float>::min() ? 0 : result;  // the instruction flushes subnormals
}

CE_DEVICE float to_accumulator(Float16 x) {
  _Float16 value;
  std::memcpy(&value, &x, sizeof(value));
  return value;
}
CE_DEVICE float to_accumulator(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
CE_DEVICE void from_accumulator(float x, Float16& result) {
  const _Float16 value = x;
  std::memcpy(&result, &value, sizeof(value));
}
CE_DEVICE void from_accumulator(float x, BFloat16& result) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  // To nearest, ties to even; a NaN stays one.
  result.bits = x != x ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#else

inline void check(cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA error in cross_entropy: ") + cudaGetErrorString(status));
  }
}

inline Device describe(int device) {
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device));
    return value;
  };
  const int major = attribute(cudaDevAttrComputeCapabilityMajor);
  const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  // More than 8 blocks is for large chips only.
  const int max_cluster = (major == 9 || major == 10) && multiprocessors >= 100 ? 16 : major > 8 ? 8 : 1;
  return {multiprocessors, attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), max_cluster};
}

inline Device current_device() {
  static const std::vector<Device> devices = [] {
    int count = 0;
    check(cudaGetDeviceCount(&count));
    std::vector<Device> all;
    for (int device = 0; device < count; ++device) {
      all.push_back(describe(device));
    }
    return all;
  }();
  int device = 0;
  check(cudaGetDevice(&device));
  return devices.at(device);
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, Stream stream, const Arguments&... arguments) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  constexpr int64_t kFreeSharedMemory = 48 << 10;  // what a block may have without asking
  if (grid.shared > kFreeSharedMemory) {
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared)));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster{};
  if (grid.cluster > 1) {
    constexpr int kPortableCluster = 8;
    if (grid.cluster > kPortableCluster) {
      check(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    }
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = grid.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

#if __CUDA_ARCH__ >= 900
#define CE_CLUSTERS
#endif

CE_DEVICE void* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

CE_DEVICE float divide_approx(float n, float d) {
  return __fdividef(n, d);
}

CE_DEVICE float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

CE_DEVICE float to_accumulator(Float16 x) {
  return __half2float(__ushort_as_half(x.bits));
}
CE_DEVICE float to_accumulator(BFloat16 x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
CE_DEVICE void from_accumulator(float x, Float16& result) {
  result.bits = __half_as_ushort(__float2half_rn(x));
}
CE_DEVICE void from_accumulator(float x, BFloat16& result) {
  result.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

#endif

CE_DEVICE float to_accumulator(float x) {
  return x;
}
CE_DEVICE double to_accumulator(double x) {
  return x;
}
CE_DEVICE void from_accumulator(float x, float& result) {
  result = x;
}
CE_DEVICE void from_accumulator(double x, double& result) {
  result = x;
}

// The blocks of a cluster. Chips without clusters are never asked to launch one.
#ifdef CE_CLUSTERS
CE_DEVICE void cluster_barrier() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}
// Where the block `rank` has in its shared memory what this block has at `address`.
template <typename P>
CE_DEVICE const P* in_block(const P* address, unsigned rank) {
  return static_cast<const P*>(__cluster_map_shared_rank(address, rank));
}
#else
CE_DEVICE void cluster_barrier() {}
template <typename P>
CE_DEVICE const P* in_block(const P* address, unsigned) {
  return address;
}
#endif

// exp(x), for x ≤ 0 within 2 units in the last place.
CE_DEVICE float exponential(float x) {
  constexpr float kLog2E = 1.44269504f;
  return exp2_approx(x * kLog2E);
}
CE_DEVICE double exponential(double x) {
  return std::exp(x);
}

CE_DEVICE float hyperbolic_tangent(float x) {
  const auto ratio = tanh_ratio(x > kTanhLimit ? kTanhLimit : x < -kTanhLimit ? -kTanhLimit : x);
  return divide_approx(ratio.numerator, ratio.denominator);
}
CE_DEVICE double hyperbolic_tangent(double x) {
  return std::tanh(x);
}

// From a logit as it is given to that of the formula.
template <typename A>
CE_DEVICE A apply(const LogitTransform<A>& transform, A x) {
  return transform.cap > 0 ? transform.cap * hyperbolic_tangent(x * transform.before_tanh()) : x * transform.scale;
}

// A scalar of the type that only the call knows.
CE_DEVICE double load_as_double(const void* data, int64_t offset, DType type) {
  switch (type) {
    case DType::kFloat64:
      return static_cast<const double*>(data)[offset];
    case DType::kFloat16:
      return to_accumulator(static_cast<const Float16*>(data)[offset]);
    case DType::kBFloat16:
      return to_accumulator(static_cast<const BFloat16*>(data)[offset]);
    default:
      return static_cast<const float*>(data)[offset];
  }
}

CE_DEVICE void store_from_double(double value, void* data, DType type) {
  switch (type) {
    case DType::kFloat64:
      *static_cast<double*>(data) = value;
      break;
    case DType::kFloat16:
      from_accumulator(static_cast<float>(value), *static_cast<Float16*>(data));
      break;
    case DType::kBFloat16:
      from_accumulator(static_cast<float>(value), *static_cast<BFloat16*>(data));
      break;
    default:
      *static_cast<float*>(data) = static_cast<float>(value);
  }
}

}  // namespace ce::cuda
