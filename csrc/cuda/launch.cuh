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
#define CE_UNROLL_BY(n)
#define CE_NO_UNROLL
#else
#define CE_UNROLL _Pragma("unroll")
#define CE_PRAGMA(text) _Pragma(#text)
#define CE_UNROLL_BY(n) CE_PRAGMA(unroll n)
#define CE_NO_UNROLL _Pragma("unroll 1")
#endif

namespace ce::cuda {

struct Grid {
  int64_t blocks;
  int threads;         // of a block
  int cluster = 1;     // neighbouring blocks that run together
  int64_t shared = 0;  // bytes
  bool early = false;  // may start before the kernel before it has ended, for which it waits by wait_for_previous()
};

constexpr int64_t kMaxBlocks = INT32_MAX;

#ifdef CE_EMULATE

inline Device current_device() {
  const emulator::Properties& properties = emulator::properties();
  return {properties.multiprocessors, properties.shared_memory, properties.max_cluster, true};
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, Stream, const Arguments&... arguments) {
  emulator::launch(__PRETTY_FUNCTION__, dim3(static_cast<unsigned>(grid.blocks)), dim3(grid.threads), grid.cluster,
                   grid.shared, [&] { kernel(arguments...); });
}

CE_DEVICE void* shared_memory() {
  return emulator::dynamic_shared();
}

CE_DEVICE void wait_for_previous() {}
CE_DEVICE void let_next_start() {}

CE_DEVICE void note_read(const void* address, int bytes) {
  emulator::note_read(address, bytes);
}
CE_DEVICE void copy_async(uint4* shared, const uint4* global) {
  __pipeline_memcpy_async(shared, global, sizeof(uint4));
}
CE_DEVICE void copy_async(int64_t* shared, const int64_t* global) {
  __pipeline_memcpy_async(shared, global, sizeof(int64_t));
}
CE_DEVICE void commit_copies() {
  __pipeline_commit();
}
CE_DEVICE void wait_for_copies(int pending) {
  __pipeline_wait_prior(pending);
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

template <typename T>
CE_DEVICE void from_accumulators(float low, float high, T* results) {
  from_accumulator(low, results[0]);
  from_accumulator(high, results[1]);
}
template <typename T>
CE_DEVICE void to_accumulators(const T* pair, float& low, float& high) {
  low = to_accumulator(pair[0]);
  high = to_accumulator(pair[1]);
}
template <typename T>
CE_DEVICE void larger_pair(const T* a, const T* b, T* results) {
  for (int i = 0; i < 2; ++i) {
    from_accumulator(std::fmax(to_accumulator(a[i]), to_accumulator(b[i])), results[i]);
  }
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
  return {multiprocessors, attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), max_cluster, major >= 9};
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
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (grid.early && current_device().starts_early) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  if (grid.cluster > 1) {
    constexpr int kPortableCluster = 8;
    if (grid.cluster > kPortableCluster) {
      check(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    }
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = grid.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
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

CE_DEVICE unsigned address_in_shared(const void* address) {
  return static_cast<unsigned>(__cvta_generic_to_shared(address));
}

// What a kernel that started early reads of the one before it, it reads after this.
CE_DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
CE_DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// For the emulator, which counts what is read.
CE_DEVICE void note_read(const void*, int) {}

// Copies that are under way while their thread goes on. Those that have been committed together arrive together.
CE_DEVICE void copy_async(uint4* shared, const uint4* global) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address_in_shared(shared)), "l"(global) : "memory");
#else
  *shared = *global;
#endif
}
CE_DEVICE void copy_async(int64_t* shared, const int64_t* global) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(address_in_shared(shared)), "l"(global) : "memory");
#else
  *shared = *global;
#endif
}
CE_DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// For this thread's own copies, but for the last `pending` commits, up to three.
CE_DEVICE void wait_for_copies(int pending) {
#if __CUDA_ARCH__ >= 800
  switch (pending) {
    case 3:
      asm volatile("cp.async.wait_group 3;" ::: "memory");
      break;
    case 2:
      asm volatile("cp.async.wait_group 2;" ::: "memory");
      break;
    case 1:
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      break;
    default:
      asm volatile("cp.async.wait_group 0;" ::: "memory");
  }
#endif
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

// Two neighbours at once.
template <typename Pair, typename T>
CE_DEVICE Pair pair_of(const T* elements) {
  static_assert(sizeof(Pair) == 2 * sizeof(T));
  Pair pair;
  memcpy(&pair, elements, sizeof(pair));
  return pair;
}
CE_DEVICE void to_accumulators(const Float16* pair, float& low, float& high) {
  const float2 values = __half22float2(pair_of<__half2>(pair));
  low = values.x;
  high = values.y;
}
CE_DEVICE void to_accumulators(const BFloat16* pair, float& low, float& high) {
  const auto bits = pair_of<unsigned>(pair);
  low = __uint_as_float(bits << 16);
  high = __uint_as_float(bits & 0xffff0000);
}
CE_DEVICE void from_accumulators(float low, float high, Float16* results) {
  const __half2 pair = __floats2half2_rn(low, high);
  memcpy(results, &pair, sizeof(pair));
}
CE_DEVICE void from_accumulators(float low, float high, BFloat16* results) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  memcpy(results, &pair, sizeof(pair));
}
// The larger ones, NaN left out.
CE_DEVICE void larger_pair(const Float16* a, const Float16* b, Float16* results) {
  const __half2 pair = __hmax2(pair_of<__half2>(a), pair_of<__half2>(b));
  memcpy(results, &pair, sizeof(pair));
}
CE_DEVICE void larger_pair(const BFloat16* a, const BFloat16* b, BFloat16* results) {
  const __nv_bfloat162 pair = __hmax2(pair_of<__nv_bfloat162>(a), pair_of<__nv_bfloat162>(b));
  memcpy(results, &pair, sizeof(pair));
}

#endif

CE_DEVICE double divide_approx(double n, double d) {
  return n / d;
}

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

constexpr float kLog2E = 1.44269504f;

// exp(x), for x ≤ 0 within 2 units in the last place.
CE_DEVICE float exponential(float x) {
  return exp2_approx(x * kLog2E);
}
CE_DEVICE double exponential(double x) {
  return std::exp(x);
}

// exp(z − reference) of many z ≤ reference, as power(z) / unit(): the product with log2(e) and the difference are one
// operation, whose constant is rounded, which makes of exp(0) a unit that is a little more or less than 1.
template <typename A>
class Exponentials;

template <>
class Exponentials<float> {
 public:
  CE_DEVICE explicit Exponentials(float reference) : reference_(reference), offset_(reference * kLog2E) {}

  // Further from 0 the constant's error is too large.
  CE_DEVICE bool apply() const { return std::fabs(reference_) < 65536; }
  CE_DEVICE float power(float z) const { return exp2_approx(std::fma(z, kLog2E, -offset_)); }
  CE_DEVICE float unit() const { return power(reference_); }

 private:
  float reference_, offset_;
};

template <>
class Exponentials<double> {
 public:
  CE_DEVICE explicit Exponentials(double reference) : reference_(reference) {}

  CE_DEVICE bool apply() const { return true; }
  CE_DEVICE double power(double z) const { return exponential(z - reference_); }
  CE_DEVICE double unit() const { return 1; }

 private:
  double reference_;
};

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
